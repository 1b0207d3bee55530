"""``train``: a LoRA adapter on the prepared conversations, with checkpoints, evaluation and resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, sha256_file
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import importing
from gemma_tune.base.words import span
from gemma_tune.config.stages import AUTO
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format, quiet_libraries
from gemma_tune.encoding.tokens import encoding_key, lengths_of, open_tokens, trained_of
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.layers import described_adapter, lora_config, target_modules
from gemma_tune.lora.load import import_peft
from gemma_tune.lora.start import load_start, names_in, patterns_of, weights_of
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement, available, best_device, choose_placement
from gemma_tune.models.source import with_weights
from gemma_tune.models.whole import refuse_rotten
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, require_inputs, run_stage
from gemma_tune.train import processes
from gemma_tune.train.batch_size import proposed
from gemma_tune.train.checkpoints import Training, step_of, unfinished
from gemma_tune.train.going_on import (
    as_before,
    as_finished,
    begin,
    continuation,
    keep_what_is_best,
    nothing_new,
    offer,
)
from gemma_tune.train.memory import BatchChoice, choose, described, refuse_four_bits, refuse_what_does_not_fit
from gemma_tune.train.overview import overview
from gemma_tune.train.plan import Side, TrainingPlan, described_steps, make_plan, rate_at, steps_per_epoch, total_steps
from gemma_tune.train.record import SettingsRecord
from gemma_tune.train.report_to import require
from gemma_tune.train.results import name_no_place, plot, save_adapter
from gemma_tune.train.shape import ModelShape, shape_of
from gemma_tune.train.start import start_folder
from gemma_tune.train.startup import Startup
from gemma_tune.train.steps import run_steps

LONG = 300.0  # seconds of training steps after which an adapter is not replaced unasked


def train(session: Session, go_on: bool = False) -> StageReport:
    """Train, or go on where an interrupted training stopped.

    Args:
        go_on: a finished training goes on from its end, with more epochs or steps, instead of starting anew.

    Raises:
        UserError: no data, unknown target modules, an adapter to start from that does not fit, out of memory.
        WorkFailed: loss or gradient not finite, a model that got worse, or one that did not change.
        Interrupted: stopped by the user; the next call resumes.
    """
    require(session.config.report_to)
    if go_on and session.force:
        raise UserError("--continue and --force exclude each other: one goes on, and the other starts anew",
                        "leave one of them out")
    checkpoints = session.run.checkpoints
    session, waiting, start = as_before(session)
    instead = None if go_on or session.force or waiting else offer(session)
    if instead:
        session.listener.note(f"this starts anew; to go on from the end of the finished training instead: {instead}")

    def has_more(manifest: Manifest) -> bool:
        return (unfinished(checkpoints, manifest.finished_trainings) is not None
                or go_on and not nothing_new(session, manifest))

    report = run_stage(session, "train", partial(_train, go_on=go_on), elsewhere=start, unfinished=has_more,
                       long_work=_took_long, instead=instead)
    if go_on and report.status == "up-to-date":
        session.listener.note("--continue goes on where more --epochs or --max-steps are asked for than there were")
    return report


def _with_batch_size(session: Session, rows: int) -> Session:
    """The same, with a number where the batch size is left to us."""
    if session.config.batch_size != AUTO:
        return session
    size, reason = proposed(rows, session.config, best_device())
    session.listener.detail("batch", reason)
    return replace(session, resolved=session.resolved.but({"batch_size": size}, {"batch_size": {"from": AUTO}}))


def _took_long(summary: Mapping[str, Any]) -> str | None:
    seconds = summary.get("training_seconds") or 0.0
    return span(seconds) if seconds > LONG else None


def plan_training(session: Session, go_on: bool = False) -> TrainingPlan:
    """What :func:`train` would do with these settings; nothing is written, and no weights are needed.

    Raises:
        UserError: no data, or settings that this model cannot be trained with.
    """
    require(session.config.report_to)
    quiet_libraries()
    session, waiting, start = as_before(session)
    session = replace(session, inputs=require_inputs(session.run, session.manifest, "train") | start)
    train_rows, valid_rows = map(Side.of, _prepared_sequences(session))
    placement = choose_placement(session.config.dtype)
    session = _with_batch_size(as_finished(session) if go_on else session, len(train_rows.lengths))
    shape, choice = _fit(session, int(train_rows.lengths.max()), placement, start=start_folder(session))
    notes = [] if len(valid_rows.lengths) else ["there are no validation sequences: nothing will show overfitting"]
    if waiting:
        notes.append(f"an interrupted training waits, with {waiting['compute']}; with its settings it goes on")
    elif go_on:
        found = continuation(session, len(train_rows.lengths))
        notes.append(f"{found.done} of these {found.total} steps are done: {found.said}")
    last = session.manifest.stages.get("train", {"base": None, "summary": {}})
    same = last["base"] == session.model.fingerprint and (last["summary"].get("device"), last["summary"].get(
        "dtype")) == (placement.device, placement.short)
    return make_plan(shape, session.config, placement, choice, train_rows, valid_rows, notes=notes,
                     tokens_per_second=last["summary"].get("tokens_per_second") if same else None)


@dataclass(frozen=True)
class Job:
    """All that the processes of one training have to agree on.

    Args:
        checkpoint: what training goes on from, or None.
        start: directory of the adapter that it started from, or None.
        earlier: records of the log up to there.
        startup: what the time went to so far.
    """

    session: Session
    training: Training
    checkpoint: Path | None
    start: Path | None
    placement: Placement
    choice: BatchChoice
    earlier: list[dict[str, Any]]
    startup: Startup


def follow() -> None:
    """Take part in a training that the main process leads, in :func:`train`; it may find nothing to do."""
    if not processes.begun():
        return
    _load_libraries()  # while the main process decides
    job = processes.received()
    if job is not None:
        _work(job, lambda: None)


def _load_libraries() -> None:
    quiet_libraries()  # before their import, which has something to say already
    import_peft()
    with importing():
        import gemma_tune.train.callbacks
        import gemma_tune.train.trainer  # noqa: F401 - with all that it stands on


def _train(session: Session, go_on: bool) -> Finished:
    startup = Startup()
    processes.begin()
    _load_libraries()
    startup.done("libraries")
    job = _decide(session, startup, go_on)
    # Their hashes take as long as loading them does, and go on beside it.
    hashing = ThreadPoolExecutor(1)
    sound = hashing.submit(refuse_rotten, job.session.model.path, job.session.model.files)
    hashing.shutdown(wait=False)
    processes.share(replace(job, session=replace(job.session, listener=Listener())))
    adapter = session.run.adapter
    outputs = {"adapter": adapter, "training_settings": session.run.train_settings}
    return Finished(outputs, _work(job, sound.result), {adapter: fresh_path(adapter)})


def _decide(session: Session, startup: Startup, go_on: bool) -> Job:
    from gemma_tune.train.callbacks import earlier_records

    processes.refuse_another_number(session.config)
    train_rows, valid_rows = _prepared_sequences(session)
    session = _with_batch_size(as_finished(session) if go_on else session, len(train_rows))
    config, run, listener = session.config, session.run, session.listener
    tokens = sha256_file(session.inputs["tokens"] / "train.arrow")
    begun = begin(session, (session.model.fingerprint, tokens, _format(session).template), len(train_rows), go_on)
    placement, checkpoint = begun.placement, begun.checkpoint
    listener.detail("device", f"computing in {placement.reason}")
    longest = int(lengths_of(train_rows).max())
    shape, choice = _fit(session, longest, placement, begun.training.micro_batch, begun.start)
    listener.detail("memory", described(choice, longest))
    refuse_what_does_not_fit(choice, config, longest, listener)
    listener.overview(overview(session, shape, choice, (lengths_of(train_rows), trained_of(train_rows)), valid_rows,
                               checkpoint))
    session = replace(session, model=with_weights(session.model, listener))
    earlier = earlier_records(run.metrics, step_of(checkpoint)) if checkpoint else []
    startup.done("plan")
    return Job(session, begun.training, checkpoint, begun.start, placement, choice, earlier, startup)


def _format(session: Session) -> ChatFormat:
    """The tokenizer and the chat template that the data was prepared with."""
    thinking = session.settings_of("prepare").get("thinking", "auto")
    return load_format(session.model.path, session.model.config["model_type"], thinking)


def _work(job: Job, refuse_bad_weights: Callable[[], Any]) -> dict[str, Any]:
    """What every process of the training does; the main one also saves. Returns figures for the summary."""
    quiet_libraries()
    from gemma_tune.train.best import Best
    from gemma_tune.train.callbacks import MetricsLog, StopRequest, earlier_records
    from gemma_tune.train.effect import AdapterStart
    from gemma_tune.train.learned import require_learned
    from gemma_tune.train.reports import Reports
    from gemma_tune.train.samples import Samples

    session, config, run, listener = job.session, job.session.config, job.session.run, job.session.listener
    chat = _format(session)
    train_rows, valid_rows = _prepared_sequences(session)
    try:
        model = load_model(session.model.path, job.placement, four_bit=config.qlora, shards=config.shards)
    finally:  # weights that are not what they were explain whatever else is wrong
        refuse_bad_weights()
    job.startup.done("weights")
    steps = total_steps(len(train_rows), config) - job.training.steps_before
    listener.detail("steps", described_steps(len(train_rows), config))
    first = step_of(job.checkpoint) if job.checkpoint else 0
    log = MetricsLog(run.metrics, listener, first, job.earlier)
    stop, reports = StopRequest(listener), Reports(session, job.training, log)
    best = Best(run.checkpoints, job.training.id, listener, keeps=config.keep == "best", patience=config.early_stopping,
                earlier=job.earlier, checkpoints=config.keep_checkpoints, keeps_start=job.training.steps_before > 0)
    samples = Samples(session, chat, config.samples, log, earlier_records(run.samples, first), job.startup.total)
    trainer = _trainer(job, model, chat, train_rows, valid_rows, steps, (log, best, samples, stop, reports))
    log.trainer = best.trainer = samples.trainer = reports.trainer = trainer
    keep_what_is_best(session, job.training, best)
    start = AdapterStart(trainer.model)
    settings = SettingsRecord(session, job.placement, job.choice)
    settings.begin()
    job.startup.done("adapter")
    with stop, reports:
        summary = run_steps(trainer, log, stop, best, samples, session, job.checkpoint, job.startup)
    settings.end(trainer)
    if processes.is_main():
        plot(log.records, run.plot)
        until = [record for record in log.records if record["step"] <= summary["kept_step"]]
        if summary["kept_step"]:  # else the adapter that it started from is the best, and stays
            summary |= require_learned(session, trainer, chat, start, until, summary["steps"])
        save_adapter(session, trainer.model, chat, run.adapter)
    return summary | job.training.went_on() | {
        "training_id": job.training.id, "device": job.placement.device, "dtype": job.placement.short,
        "batch_size": config.batch_size, "effective_batch": config.effective_batch, "micro_batch": trainer.micro_batch,
        "activation_checkpointing": job.choice.checkpointing,
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0]}


def _prepared_sequences(session: Session) -> tuple[Any, Any]:
    """Training's and validation's sequences, as ``prepare`` wrote them.

    Raises:
        UserError: another version of the code or its libraries made them, which might do it differently today.
    """
    folder = session.inputs["tokens"]
    if session.manifest.stages["prepare"]["summary"].get("encoding") != encoding_key(session.model.fingerprint):
        raise UserError("the prepared tokens were made by another version of gemma-tune or its libraries, or with "
                        "another tokenizer", f"make them again: {command('prepare', session.run.root)}")
    return open_tokens(folder / "train.arrow"), open_tokens(folder / "valid.arrow")


def _fit(session: Session, longest: int, placement: Placement, before: int = 0,
         start: Path | None = None) -> tuple[ModelShape, BatchChoice]:
    """How large the model is, and how a batch of its longest rows can go through it here.

    Args:
        before: the micro-batch that a resumed training had, which is kept if it fits.
        start: directory of the adapter that is trained further.
    """
    refuse_four_bits(session.config, placement.device)
    shape = shape_of(session.model.path, session.config, placement.dtype, read_adapter(start) if start else None)
    # Processes on a CPU share its memory; each has a GPU to itself.
    share = processes.place().local_count if placement.device == "cpu" else 1
    room = available(placement.device) // share
    if before and session.config.micro_batch is None:
        kept = choose(shape, replace(session.config, micro_batch=before), longest, placement.device, room)
        if kept.fits:
            return shape, kept
    return shape, choose(shape, session.config, longest, placement.device, room)


def _trainer(job: Job, model, chat, train_rows, valid_rows, steps, callbacks):
    from transformers import PrinterCallback, ProgressCallback

    from gemma_tune.lora.dora import start_from_base
    from gemma_tune.train.culprits import names_of
    from gemma_tune.train.trainer import GemmaTrainer

    session, config = job.session, job.session.config
    start = read_adapter(job.start) if job.start else None
    names = names_in(model, start) if start else {}
    chosen = sorted(names.values()) if start else target_modules(model, config.target_modules)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    session.listener.detail("adapter", f"{described_adapter(config)}, on {len(chosen)} linear layers "
                                       f"({', '.join(leaves)})")
    try:
        arguments = _arguments(session, steps, len(train_rows), job.placement, job.choice, bool(len(valid_rows)))
        trainer = GemmaTrainer(
            model=model, args=arguments,
            train_dataset=train_rows, eval_dataset=valid_rows if len(valid_rows) else None,
            processing_class=chat.tokenizer,
            peft_config=lora_config(config, chosen, **(patterns_of(start, names) if start else {})),
            callbacks=[*callbacks], training=job.training, listener=session.listener,
            lengths=(lengths_of(train_rows), lengths_of(valid_rows)),
            trained=(trained_of(train_rows), trained_of(valid_rows)),
            micro_batch=job.choice.micro_batch, rate=lambda step: rate_at(step, steps, config),
            row_names=names_of(session.run, train_rows))
    except ValueError as e:
        raise UserError(f"this model cannot be trained with these settings: {e}",
                        "see `gemma-tune train --help`") from e
    name_no_place(trainer.model, session.model.id)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if config.dora:
        start_from_base(trainer.model)
    if start and job.checkpoint is None:
        load_start(trainer.model, weights_of(start, names))
    return trainer


def _arguments(session: Session, steps: int, rows: int, placement: Any, choice: BatchChoice,
               evaluates: bool):
    import torch
    from trl import SFTConfig

    config = session.config
    per_epoch = steps_per_epoch(rows, config)
    arguments = SFTConfig(
        output_dir=str(session.run.checkpoints), max_steps=steps, per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate, max_grad_norm=config.clip,
        weight_decay=config.weight_decay, seed=config.seed, data_seed=config.seed,
        optim="adamw_torch_fused" if placement.device == "cuda" else "adamw_torch",
        use_cpu=placement.device == "cpu", bf16=False, fp16=placement.dtype == torch.float16,
        activation_checkpointing=choice.checkpointing,
        logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no", eval_steps=config.eval_steps or per_epoch,
        save_strategy="steps", save_steps=config.save_steps or per_epoch, save_total_limit=None,
        report_to=[], disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        dataloader_pin_memory=False, remove_unused_columns=False)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would put the model on all of them with DataParallel
        session.listener.note(f"training on one GPU of {torch.cuda.device_count()}; all train together with "
                              f"--num-processes {torch.cuda.device_count()}")
    return arguments
