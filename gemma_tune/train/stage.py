"""``train``: a LoRA adapter on the prepared conversations, with checkpoints, evaluation and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, remove
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import span
from gemma_tune.config.rewards import in_words, read
from gemma_tune.config.settings import NOT_GIVEN
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import quiet_libraries
from gemma_tune.encoding.tokens import pictures_in
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.models.source import with_weights
from gemma_tune.rewards.files import reward_files
from gemma_tune.rewards.program import refuse_missing
from gemma_tune.rewards.scores import Scorer
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, locked, run_stage
from gemma_tune.run.state import require_inputs
from gemma_tune.run.stopped import rows_of, step_of, unfinished, whole
from gemma_tune.train import processes
from gemma_tune.train.aside import forget, is_aside, put_back
from gemma_tune.train.asked import refuse_divided_tokens
from gemma_tune.train.going_on import (
    as_before,
    as_finished,
    begin,
    compute_of,
    continuation,
    keep_what_is_best,
    nothing_new,
    offer,
)
from gemma_tune.train.job import (
    Job,
    chat_format_of,
    checked_beside,
    fit,
    load_libraries,
    make_trainer,
    prepared_sequences,
    refuse_start_of_others,
    sequences_of_a_row,
    sizes_of,
    with_batch_size,
)
from gemma_tune.train.looking import described as described_pictures
from gemma_tune.train.looking import look, refuse_what_cannot_be_seen, shown_in
from gemma_tune.train.memory import described, refuse_what_does_not_fit
from gemma_tune.train.overview import overview
from gemma_tune.train.plan import TrainingPlan, described_steps, make_plan, speed_of, surprises, total_steps
from gemma_tune.train.record import SettingsRecord
from gemma_tune.train.report_to import require
from gemma_tune.train.results import plot, save_adapter
from gemma_tune.train.shape import ModelShape
from gemma_tune.train.start import start_folder
from gemma_tune.train.startup import Startup
from gemma_tune.train.steps import run_steps
from gemma_tune.train.tuning import read_tuning
from gemma_tune.train.verdict import measure_of

if TYPE_CHECKING:
    from gemma_tune.train.ahead import KernelsAhead
    from gemma_tune.train.best import Best
    from gemma_tune.train.callbacks import MetricsLog, StopRequest
    from gemma_tune.train.reports import Reports
    from gemma_tune.train.samples import Samples
    from gemma_tune.train.trainer import GemmaTrainer

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
    session.require("train")
    require(session.config.report_to)
    refuse_divided_tokens(session)
    if go_on and session.force:
        raise UserError("--continue and --force exclude each other: one goes on, and the other starts anew",
                        "leave one of them out")
    checkpoints = session.run.checkpoints
    session, waiting, start = as_before(session, go_on)
    instead = None if go_on or session.force or waiting else offer(session)
    if instead:
        session.listener.note(f"this starts anew; to go on from the end of the finished training instead: {instead}")

    def has_more(manifest: Manifest) -> bool:
        return (unfinished(checkpoints, manifest.finished_trainings) is not None
                or go_on and not nothing_new(session, manifest))

    scripts = reward_files(session, read(session.config.reward))
    report = run_stage(session, "train", partial(_train, go_on=go_on), scripts, has_more, start,
                       long_work=_took_long, instead=instead)
    _after(session, report)
    if go_on and report.status == "up-to-date":
        session.listener.note("--continue goes on where more --epochs or --max-steps are asked for than there were")
    return report


def _after(session: Session, report: StageReport) -> None:
    """What a training that was killed had set aside comes back, and goes where another one has taken its place."""
    training = report.summary.get("training_id")
    if training is None or not is_aside(session.run):
        return
    with locked(session, "train"):
        if report.status == "up-to-date":
            put_back(session.run, session.manifest, session.listener)
        forget(session.run, training)


def _took_long(summary: Mapping[str, Any]) -> str | None:
    seconds = summary.get("training_seconds") or 0.0
    return span(seconds) if seconds > LONG else None


def plan_training(session: Session, go_on: bool = False) -> TrainingPlan:
    """What :func:`train` would do with these settings; nothing is written, and no weights are needed.

    Raises:
        UserError: no data, or settings that this model cannot be trained with.
    """
    require(session.config.report_to)
    refuse_divided_tokens(session)
    quiet_libraries()
    session, waiting, start = as_before(session, go_on, writes=False)
    session = replace(session, inputs=require_inputs(session.run, session.manifest, "train") | start)
    sequences = prepared_sequences(session, session.listener)
    refuse_missing(read(session.config.reward))
    sizes = [sizes_of(rows, session.config) for rows in sequences]
    placement = choose_placement(session.config.dtype)
    session = with_batch_size(as_finished(session) if go_on else session, len(sizes[0]))
    notes = [] if len(sizes[1]) else ["there are no validation sequences: nothing will show overfitting"]
    done = micro_batch = 0
    if session.force and unfinished(session.run.checkpoints, session.manifest.finished_trainings):
        notes.append("an interrupted training waits, and --force starts anew: it is lost when the first step begins")
    elif waiting:
        done = step_of(whole(session.run.checkpoints)[-1]) + waiting["steps_before"]
        micro_batch = waiting["micro_batch"]
        notes.append(f"an interrupted training waits, with {waiting['compute']}; with its settings it goes on")
    elif go_on:
        found = continuation(session, len(sizes[0]))
        done, micro_batch = found.done, found.before["micro_batch"]
        notes.append(f"{found.done} of these {found.total} steps are done: {found.said}")
    placement, shape, choice = fit(session, sizes, placement, micro_batch, start_folder(session))
    if placement.stored:
        notes.append(f"computing in {placement.reason}")
    shown = None
    if any(map(pictures_in, sequences)):  # else no tokenizer is needed
        shown = shown_in(session, chat_format_of(session), sequences, placement)
        refuse_what_cannot_be_seen(shown, session, shape, choice)
    last = session.manifest.stages.get("train")
    speed = speed_of(last, session.config, placement, choice) if (
        last and last["base"] == session.model.fingerprint) else None
    return make_plan(shape, session.config, placement, choice, *sizes, notes=notes, steps_done=done,
                     pictures=described_pictures(shown, session.model.path, shape.item) if shown else "",
                     tokens_per_second=speed)


def follow() -> None:
    """Take part in a training that the main process leads, in :func:`train`; it may find nothing to do."""
    if not processes.begun():
        return
    load_libraries()  # while the main process decides
    job = processes.received()
    if job is not None:
        _work(job, chat_format_of(job.session), lambda: None)


def _train(session: Session, go_on: bool) -> Finished:
    startup = Startup()
    processes.begin()
    load_libraries()
    startup.done("libraries")
    put_back(session.run, session.manifest, session.listener)  # after a training that was killed
    job, shape, chat = _decide(session, startup, go_on)
    sound = checked_beside(job.session.model)
    processes.share(replace(job, session=replace(job.session, listener=Listener())))
    outputs = {"adapter": session.run.adapter, "training_settings": session.run.train_settings}
    from gemma_tune.train.ahead import KernelsAhead

    try:
        with closing(KernelsAhead(shape.model, job.placement.device)) as kernels:
            summary = _work(job, chat, sound.result, kernels)
    except BaseException:
        remove(fresh_path(session.run.train_settings))
        put_back(session.run, session.manifest, session.listener)
        raise
    return Finished(outputs, summary, {path: fresh_path(path) for path in outputs.values()})


def _decide(session: Session, startup: Startup, go_on: bool) -> tuple[Job, ModelShape, ChatFormat]:
    from gemma_tune.train.callbacks import earlier_records

    processes.refuse_another_number(session.config)
    sequences = prepared_sequences(session, session.listener)
    refuse_missing(read(session.config.reward))
    sizes = [sizes_of(rows, session.config) for rows in sequences]
    session = with_batch_size(as_finished(session) if go_on else session, len(sizes[0]))
    config, run, listener = session.config, session.run, session.listener
    chat = chat_format_of(session)  # a Gemma's tokenizer takes seconds to load
    written = " ".join([chat.template, *(f"{i}:{old}" for i, old in chat.new_tokens.items())])
    content = session.model.fingerprint, rows_of(session.inputs["tokens"]), written
    begun = begin(session, content, len(sizes[0]), go_on)
    refuse_start_of_others(begun.start, chat)
    checkpoint, longest = begun.checkpoint, sizes[0].longest
    placement, shape, choice = fit(session, sizes, begun.placement, begun.training.micro_batch, begun.start)
    listener.detail("device", f"computing in {placement.reason}")
    if config.method == "grpo":
        listener.detail("rewards", f"rewards: {in_words(config.reward)}")
    listener.detail("memory", described(choice, longest))
    refuse_what_does_not_fit(choice, config, longest, listener)
    shown = shown_in(session, chat, sequences, placement)
    refuse_what_cannot_be_seen(shown, session, shape, choice)
    if shown:
        listener.detail("pictures", described_pictures(shown, session.model.path, shape.item))
    listener.overview(overview(session, shape, choice, sizes, checkpoint))
    session = replace(session, model=with_weights(session.model, listener))
    earlier = earlier_records(run.metrics, step_of(checkpoint)) if checkpoint else []
    startup.done("plan")
    training = replace(begun.training, compute=compute_of(placement))
    return Job(session, training, checkpoint, begun.start, placement, choice, earlier, startup), shape, chat


def _work(job: Job, chat: ChatFormat, refuse_bad_weights: Callable[[], Any],
          kernels: KernelsAhead | None = None) -> dict[str, Any]:
    """What every process of the training does; the main one also saves. Returns figures for the summary."""
    quiet_libraries()
    config = job.session.config
    with Scorer(read(config.reward)) if config.method == "grpo" else contextlib.nullcontext() as scorer:
        return _trained(job, chat, refuse_bad_weights, kernels, scorer)


def _trained(job: Job, chat: ChatFormat, refuse_bad_weights: Callable[[], Any], kernels: KernelsAhead | None,
             scorer: Scorer | None) -> dict[str, Any]:
    from gemma_tune.train.effect import AdapterStart
    from gemma_tune.train.learned import require_learned

    session, config, run, listener = job.session, job.session.config, job.session.run, job.session.listener
    train_rows, valid_rows = prepared_sequences(session)
    shown = shown_in(session, chat, (train_rows, valid_rows), job.placement)
    if shown:
        look(shown, session.model.path, job.placement, refuse_bad_weights, listener)
        job.startup.done("pictures")
    try:
        model = load_model(session.model.path, job.placement, four_bit=config.qlora, shards=config.shards,
                           sight="features" if shown else "none")
    finally:  # weights that are not what they were explain whatever else is wrong
        refuse_bad_weights()
    job.startup.done("weights")
    rows = len(train_rows) // sequences_of_a_row(config)
    steps = total_steps(rows, config) - job.training.steps_before
    _tell_of_steps(session, rows)
    log, best, samples, stop, reports = callbacks = _callbacks(job, chat)
    trainer = make_trainer(job, model, chat, train_rows, valid_rows, steps, callbacks, shown, scorer)
    log.trainer = best.trainer = samples.trainer = reports.trainer = trainer
    keep_what_is_best(session, job.training, best)
    start = AdapterStart(trainer.model, trainer.base)
    trainer.base.rest(session.model.path)
    settings = SettingsRecord(session, job.placement, job.choice, bool(job.training.earlier))
    settings.begin()
    job.startup.done("adapter")
    if kernels:
        kernels.wait(job.startup)
    with stop, reports:
        summary = run_steps(trainer, log, stop, best, samples, session, job.choice, job.checkpoint, job.startup)
    settings.end(trainer)
    if processes.is_main():
        plot(log.records, run.plot, config.method)
        until = [record for record in log.records if record["step"] <= summary["kept_step"]]
        if summary["kept_step"]:  # else the adapter that it started from is the best, and stays
            summary |= require_learned(session, trainer, chat, start, until, summary["steps"])
        save_adapter(session, trainer.model, chat, run.adapter)
    pictures = {"pictures": len(shown.names)} if shown else {}
    return job.training.of_all_steps(summary) | pictures | _figures(job, trainer)


def _callbacks(job: Job, chat: ChatFormat) -> tuple[MetricsLog, Best, Samples, StopRequest, Reports]:
    """What the trainer calls, in this order."""
    from gemma_tune.train.best import Best
    from gemma_tune.train.callbacks import MetricsLog, StopRequest, earlier_records
    from gemma_tune.train.reports import Reports
    from gemma_tune.train.samples import Samples

    session, config, run, listener = job.session, job.session.config, job.session.run, job.session.listener
    first = step_of(job.checkpoint) if job.checkpoint else 0
    log = MetricsLog(run.metrics, listener, first, job.earlier)
    stop, reports = StopRequest(listener), Reports(session, job.training, log)
    measure = measure_of(config)
    best = Best(run.checkpoints, job.training.id, listener, keeps=config.keep == "best", patience=config.early_stopping,
                earlier=job.earlier, checkpoints=config.keep_checkpoints, before=job.training.steps_before,
                first=job.training.before.get(f"{measure.key}_before"), measure=measure)
    samples = Samples(session, chat, config.samples, log, earlier_records(run.samples, first), job.startup.total)
    return log, best, samples, stop, reports


def _tell_of_steps(session: Session, rows: int) -> None:
    """How many there are, and what somebody may not expect of their settings."""
    listener, config, tuned = session.listener, session.config, session.run.tune_settings
    search = read_tuning(session.run.tuning)
    fits = search is None or search.of_all_weights == config.full
    listener.detail("steps", described_steps(rows, config))
    if fits and tuned.is_file() and session.resolved.origins["learning_rate"] in NOT_GIVEN:
        listener.note(f"{tuned} has the settings that `tune` found best: --config {tuned}")
    for text in surprises(rows, total_steps(rows, config), config):
        listener.note(text)


def _figures(job: Job, trainer: GemmaTrainer) -> dict[str, Any]:
    """What a summary tells of how the training was computed."""
    config = job.session.config
    return {"training_id": job.training.id, "method": config.method, "device": job.placement.device,
            "dtype": job.placement.short, "batch_size": config.batch_size, "effective_batch": config.effective_batch,
            "micro_batch": trainer.micro_batch, "activation_checkpointing": job.choice.checkpointing,
            "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0]}
