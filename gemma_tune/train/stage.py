"""``train``: a LoRA adapter on the prepared conversations, with checkpoints, evaluation and resume."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import Interrupted, UserError, WorkFailed
from gemma_tune.base.files import replacing_directory, sha256_file
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import importing
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format, quiet_libraries
from gemma_tune.encoding.tokens import encoding_key, lengths_of, open_tokens
from gemma_tune.lora.layers import TOWERS, described_adapter, lora_config, target_modules, trained_weights
from gemma_tune.lora.load import import_peft
from gemma_tune.models.load import is_out_of_memory, load_model, out_of_memory
from gemma_tune.models.placement import Placement, available, choose_placement
from gemma_tune.models.source import with_weights
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, require_inputs, run_stage
from gemma_tune.train import processes
from gemma_tune.train.checkpoints import (
    Training,
    clear,
    command_to_finish,
    find_resumable,
    read_marker,
    step_of,
    training_key,
    unfinished,
)
from gemma_tune.train.memory import BatchChoice, choose, described, refuse_what_does_not_fit
from gemma_tune.train.plan import Side, TrainingPlan, make_plan, steps_per_epoch, total_steps, warmup_steps
from gemma_tune.train.shape import ModelShape, shape_of


def train(session: Session) -> StageReport:
    """Train, or go on where an interrupted training stopped.

    Raises:
        UserError: no data, unknown target modules, out of memory.
        WorkFailed: loss or gradient not finite.
        Interrupted: stopped by the user; the next call resumes.
    """
    waiting = unfinished(session.run.checkpoints, session.manifest.finished_training)
    return run_stage(session, "train", _train, unfinished=waiting is not None)


def plan_training(session: Session) -> TrainingPlan:
    """What :func:`train` would do with these settings; nothing is written, and no weights are needed.

    Raises:
        UserError: no data, or settings that this model cannot be trained with.
    """
    quiet_libraries()
    session = replace(session, inputs=require_inputs(session.run, session.manifest, "train"))
    train_rows, valid_rows = map(Side.of, _prepared_sequences(session))
    placement = choose_placement(session.config.dtype)
    shape, choice = _fit(session, int(train_rows.lengths.max()), placement)
    notes = [] if len(valid_rows.lengths) else ["there are no validation sequences: nothing will show overfitting"]
    if waiting := unfinished(session.run.checkpoints, session.manifest.finished_training):
        notes.append(f"an interrupted training waits, with {waiting['compute']}; with its settings it goes on")
    last = session.manifest.stages.get("train", {"base": None, "summary": {}})
    same = last["base"] == session.model.fingerprint and (last["summary"].get("device"), last["summary"].get(
        "dtype")) == (placement.device, placement.short)
    return make_plan(shape, session.config, placement, choice, train_rows, valid_rows, notes=notes,
                     tokens_per_second=last["summary"].get("tokens_per_second") if same else None)


@dataclass(frozen=True)
class _Job:
    """All that the processes of one training have to agree on.

    Args:
        checkpoint: what training goes on from, or None.
        earlier: records of the log up to there.
    """

    session: Session
    training: Training
    checkpoint: Path | None
    placement: Placement
    choice: BatchChoice
    earlier: list[dict[str, Any]]


def follow() -> None:
    """Take part in a training that the main process leads, in :func:`train`; it may find nothing to do."""
    _load_libraries()  # while the main process decides
    job = processes.received()
    if job is not None:
        _work(job)


def _load_libraries() -> None:
    quiet_libraries()  # before their import, which has something to say already
    import_peft()
    with importing():
        import gemma_tune.train.callbacks
        import gemma_tune.train.trainer  # noqa: F401 - with all that it stands on


def _train(session: Session) -> Finished:
    _load_libraries()
    job = _decide(session)
    processes.share(replace(job, session=replace(job.session, listener=Listener())))
    return Finished({"adapter": session.run.adapter}, _work(job))


def _decide(session: Session) -> _Job:
    from gemma_tune.train.callbacks import earlier_records

    config, run, listener = session.config, session.run, session.listener
    _refuse_processes(config)
    train_rows, _ = _prepared_sequences(session)
    tokens = sha256_file(session.inputs["tokens"] / "train.arrow")
    key = training_key(session.model.fingerprint, tokens, _format(session).template, config.as_dict())
    checkpoint = _checkpoint_to_resume(session, key)
    placement, training = _placement_and_training(config, key, checkpoint)
    listener.note(f"computing in {placement.reason}")
    longest = int(lengths_of(train_rows).max())
    _, choice = _fit(session, longest, placement, training.micro_batch)
    listener.note(described(choice, longest))
    refuse_what_does_not_fit(choice, config, longest, listener)
    session = replace(session, model=with_weights(session.model, listener))
    earlier = earlier_records(run.metrics, step_of(checkpoint)) if checkpoint else []
    return _Job(session, training, checkpoint, placement, choice, earlier)


def _refuse_processes(config: Any) -> None:
    here = processes.place().count
    if config.num_processes != here:
        raise UserError(f"{config.num_processes} processes were asked for, and this is one of {here}",
                        "start them: gemma-tune train --num-processes N, or accelerate launch -m gemma_tune train")
    if config.strategy != "fsdp":
        return
    if here == 1:
        raise UserError("--strategy fsdp divides the model among several processes, and this is one",
                        "add --num-processes N, or leave --strategy out")


def _format(session: Session) -> ChatFormat:
    """The tokenizer and the chat template that the data was prepared with."""
    thinking = session.settings_of("prepare").get("thinking", "auto")
    return load_format(session.model.path, session.model.config["model_type"], thinking)


def _work(job: _Job) -> dict[str, Any]:
    """What every process of the training does; the main one also saves. Returns figures for the summary."""
    quiet_libraries()
    from gemma_tune.train.callbacks import MetricsLog, StopRequest

    session, config, run, listener = job.session, job.session.config, job.session.run, job.session.listener
    chat = _format(session)
    train_rows, valid_rows = _prepared_sequences(session)
    model = load_model(session.model.path, job.placement, four_bit=config.qlora, shards=config.shards)
    steps = total_steps(len(train_rows), config)
    listener.note(f"{len(train_rows):,} sequences x {config.epochs:g} epochs in batches of "
                  f"{config.effective_batch}: {steps} steps")
    log = MetricsLog(run.metrics, listener, step_of(job.checkpoint) if job.checkpoint else 0, job.earlier)
    stop = StopRequest(listener)
    trainer = _trainer(session, model, chat, train_rows, valid_rows, steps, job.placement, job.choice, (log, stop),
                       job.training)
    log.trainer = trainer
    with stop:
        summary = _run(trainer, log, stop, session, job.checkpoint)
    if processes.is_main():
        _save_adapter(session, trainer.model, chat)
        _plot(log.records, run.plot)
    return summary | {
        "training_id": job.training.id, "device": job.placement.device, "dtype": job.placement.short,
        "effective_batch": config.effective_batch, "micro_batch": trainer.micro_batch,
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


def _placement_and_training(config: Any, key: str, checkpoint: Path | None) -> tuple[Placement, Training]:
    """Device and type, and the training's identity. A resumed one keeps those that it began with."""
    marker = read_marker(checkpoint) if checkpoint else None
    kept = marker["compute"].split() if marker else None
    placement = choose_placement(kept[1] if kept and config.dtype == "auto" else config.dtype)
    compute = f"{placement.device} {placement.short}"
    if kept and kept[1] != placement.short:
        raise UserError(f"the interrupted training computed in {kept[1]}, and --dtype asks for {placement.short}",
                        "leave --dtype out to finish it, or start anew with --force")
    if marker is None:
        return placement, Training(uuid.uuid4().hex, key, config.as_dict(), compute)
    return placement, Training(marker["id"], key, config.as_dict(), compute, marker.get("micro_batch", 0))


def _checkpoint_to_resume(session: Session, key: str) -> Path | None:
    finished = session.manifest.finished_training
    checkpoints = session.run.checkpoints
    checkpoint = None if session.force else find_resumable(checkpoints, key, finished, session.config.as_dict())
    if checkpoint:
        session.listener.note(f"going on from {checkpoint.name}, where an earlier training stopped")
    return checkpoint


def _fit(session: Session, longest: int, placement: Placement, before: int = 0) -> tuple[ModelShape, BatchChoice]:
    """How large the model is, and how a batch of its longest rows can go through it here.

    Args:
        before: the micro-batch that a resumed training had, which is kept if it fits.
    """
    shape = shape_of(session.model.path, session.config, placement.dtype)
    # Processes on a CPU share its memory; each has a GPU to itself.
    share = processes.place().local_count if placement.device == "cpu" else 1
    room = available(placement.device) // share
    if before and session.config.micro_batch is None:
        kept = choose(shape, replace(session.config, micro_batch=before), longest, placement.device, room)
        if kept.fits:
            return shape, kept
    return shape, choose(shape, session.config, longest, placement.device, room)


def _trainer(session, model, chat, train_rows, valid_rows, steps, placement, choice, callbacks, training):
    from transformers import PrinterCallback, ProgressCallback

    from gemma_tune.lora.dora import start_from_base
    from gemma_tune.train.callbacks import FiniteGuard
    from gemma_tune.train.trainer import GemmaTrainer

    config = session.config
    chosen = target_modules(model, config.target_modules)
    leaves = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    session.listener.note(f"{described_adapter(config)}, on {len(chosen)} linear layers ({', '.join(leaves)})")
    try:
        trainer = GemmaTrainer(
            model=model, args=_arguments(session, steps, len(train_rows), placement, choice, bool(len(valid_rows))),
            train_dataset=train_rows, eval_dataset=valid_rows if len(valid_rows) else None,
            processing_class=chat.tokenizer, peft_config=lora_config(config, chosen),
            callbacks=[*callbacks, FiniteGuard()], training=training, listener=session.listener,
            lengths=(lengths_of(train_rows), lengths_of(valid_rows)), micro_batch=choice.micro_batch)
    except ValueError as e:
        raise UserError(f"this model cannot be trained with these settings: {e}",
                        "see `gemma-tune train --help`") from e
    _name_no_place(trainer.model, session.model.id)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if config.dora:
        start_from_base(trainer.model)
    return trainer


def _name_for_others(model: Any, session: Session) -> None:
    """adapter_config.json in the form that other programs expect: short layer names, the base model's public id.

    Only at the end: PEFT asks the hub about a base model with a hub id whenever it saves a checkpoint.
    """
    peft_config = model.peft_config["default"]
    if not any(TOWERS.search(name) for name, _ in model.get_base_model().named_modules()):
        # A sorted list: PEFT writes a set in another order each time, and the adapter's fingerprint would change.
        peft_config.target_modules = sorted({name.rsplit(".", 1)[-1] for name in peft_config.target_modules})
    peft_config.base_model_name_or_path = session.model.id
    peft_config.revision = session.model.revision


def _name_no_place(model: Any, name: str) -> None:
    """What PEFT writes into checkpoints of where the base model lies: its name in their card, else nothing."""
    base = model.get_base_model()
    base.config._name_or_path = base.name_or_path = name
    model.peft_config["default"].base_model_name_or_path = ""


def _arguments(session: Session, steps: int, rows: int, placement: Any, choice: BatchChoice,
               evaluates: bool):
    import torch
    from trl import SFTConfig

    config = session.config
    per_epoch = steps_per_epoch(rows, config)
    arguments = SFTConfig(
        output_dir=str(session.run.checkpoints), max_steps=steps, per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size, gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate, warmup_steps=warmup_steps(steps, config), max_grad_norm=config.clip,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        weight_decay=config.weight_decay, optim="adamw_torch", seed=config.seed, data_seed=config.seed,
        use_cpu=placement.device == "cpu", bf16=False, fp16=placement.dtype == torch.float16,
        activation_checkpointing=choice.checkpointing,
        logging_steps=1, logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no", eval_steps=config.eval_steps or per_epoch,
        save_strategy="steps", save_steps=config.save_steps or per_epoch, save_total_limit=None,
        report_to=[], disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        dataloader_pin_memory=placement.device == "cuda", remove_unused_columns=False,
        # A step leaves no tensor out: a process without a row of its own has gradients of zero. Buffers are constants.
        ddp_find_unused_parameters=False, ddp_broadcast_buffers=False)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would put the model on all of them with DataParallel
        session.listener.note(f"training on one GPU of {torch.cuda.device_count()}; all train together with "
                              f"--num-processes {torch.cuda.device_count()}")
    return arguments


def _run(trainer, log, stop, session: Session, checkpoint: Path | None) -> dict[str, Any]:
    """Evaluate, train, evaluate; figures for the summary."""
    evaluates = trainer.eval_dataset is not None
    try:
        with trainer.fast(session.config.compile):
            if checkpoint is None and processes.is_main():  # only now: what can fail at once has not
                clear(session.run.checkpoints)
            if evaluates and checkpoint is None:
                trainer.evaluate()  # the adapter starts at zero, so this is the base model's loss
            if log.first_step < trainer.args.max_steps:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:  # it was interrupted after the last step: all that is missing is the adapter
                trainer.state.global_step = trainer.state.max_steps = log.first_step
                _load_trained(trainer.model, checkpoint)
            if stop.requested and trainer.state.global_step < trainer.state.max_steps:
                raise Interrupted(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; it is "
                                  "saved", "repeat the same command to go on from there, or: "
                                  + command_to_finish(session.run.checkpoints, session.config.as_dict()))
            if evaluates and (not log.records or "eval_loss" not in log.records[-1]):
                trainer.evaluate()
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(e) from e
        raise
    losses = [r["loss"] for r in log.records if "loss" in r]
    evals = {r["step"]: r["eval_loss"] for r in log.records if "eval_loss" in r}
    last = trainer.state.global_step
    return {"steps": trainer.state.global_step, "train_loss_first": losses[0] if losses else None,
            "train_loss_last": losses[-1] if losses else None,
            "eval_loss_before": evals.get(0), "eval_loss_after": evals.get(last),
            "tokens": log.tokens, "tokens_per_second": round(log.tokens_per_second, 1),
            "training_seconds": round(log.seconds_before + log.busy, 1), "resumed_from_step": log.first_step}


def _load_trained(model: Any, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))


def _save_adapter(session: Session, model: Any, chat: ChatFormat) -> None:
    """Standard PEFT directory with tokenizer, chat template and generation settings, replaced as a whole."""
    import torch

    bad = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise WorkFailed(f"{len(bad)} tensors of the trained adapter are not finite ({bad[0]}, …); it was not saved",
                         "train again with a lower --learning-rate, or with --dtype fp32")
    _name_for_others(model, session)
    with replacing_directory(session.run.adapter) as folder:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False,
                              state_dict=trained_weights(model))
        chat.tokenizer.save_pretrained(folder)
        generation = model.get_base_model().generation_config
        generation.eos_token_id = chat.stop_ids
        # Not save_pretrained: it refuses settings that many published models have, such as top_p without do_sample.
        (folder / "generation_config.json").write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
        (folder / "README.md").write_text(_card(session), encoding="utf-8")


def _card(session: Session) -> str:
    base = session.model
    return (f"---\nlibrary_name: peft\nbase_model: {base.id}\ntags: [lora, sft, gemma-tune]\n---\n\n"
            f"# {base.name}: LoRA adapter\n\nTrained with gemma-tune on {base.id}"
            f"{f' at {base.revision}' if base.revision else ''}; the settings are in the run's manifest.json. "
            "The chat template in this directory is the one used in training.\n")


def _plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Training and validation loss over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o--")):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points), style, label=label, linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
