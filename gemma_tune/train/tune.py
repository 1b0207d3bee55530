"""``tune``: which learning rate, and which rank, suits the prepared data; a few are tried on a part of it."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.errors import Interrupted, UserError, WorkFailed
from gemma_tune.base.files import os_errors
from gemma_tune.base.words import counted, span
from gemma_tune.config.settings import same_result
from gemma_tune.config.stages import TrainConfig, TuneConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.lora.start import digest_of
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement, choose_placement
from gemma_tune.models.source import with_weights
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport, locked
from gemma_tune.run.state import require_inputs, require_unharmed
from gemma_tune.train.checkpoints import training_key
from gemma_tune.train.halving import Candidate, Costs, candidates_for, least_seconds, plan, plan_rungs
from gemma_tune.train.job import (
    chat_format_of,
    checked_beside,
    fit,
    load_libraries,
    prepared_sequences,
    refuse_start_of_others,
    sequences_of_a_row,
    sizes_of,
    with_batch_size,
)
from gemma_tune.train.looking import Shown, look, refuse_what_cannot_be_seen, shown_in
from gemma_tune.train.memory import BatchChoice, refuse_what_does_not_fit
from gemma_tune.train.method import with_method
from gemma_tune.train.start import start_folder, with_start
from gemma_tune.train.tune_report import show, write_results
from gemma_tune.train.tuning import Begun, Tuning, read_tuning

# Settings of a training that nothing of a trial depends on; learning rate and rank are what is tried.
_FREE = ("learning_rate", "rank", "save_steps", "early_stopping", "num_processes", "strategy",
         *same_result(TrainConfig))

_PLANNED = 0.85  # of the time left: a machine is slower at times, and what is left over goes into later rungs


def tune(session: Session, settings: TuneConfig | None = None) -> StageReport:
    """Try candidates by successive halving, or go on with that, and write the best of them to ``tune.yaml``.

    Args:
        session: opened for ``train``, whose settings the candidates have but for what is tried.

    Raises:
        UserError: no data, no validation rows, too little time or memory.
        WorkFailed: no candidate lowers the validation loss.
        Interrupted: stopped by the user; the next call goes on.
    """
    session.require("train")
    run, started, settings = session.run, time.monotonic(), settings or TuneConfig()
    with locked(session, "tune"), os_errors(run.root):
        manifest = read_manifest(run.root) or session.manifest
        asked = replace(session, manifest=manifest)
        session, start = with_start(_without_rewards(with_method(asked)), None, writes=False)
        session = replace(session, inputs=require_inputs(run, manifest, "train") | start)
        require_unharmed(run, manifest, "tune", "prepare", "tokens")
        job = _job(session, asked, settings, started)
        tuning = _begun(job)
        if tuning.ended:
            session.listener.note("`tune` is up to date; --force tries everything again")
            return _report(job, tuning, "up-to-date")
        _search(job, tuning)
        return _report(job, tuning, "done")


def _without_rewards(session: Session) -> Session:
    """The session, unless its method has no validation loss that candidates could be compared by.

    Raises:
        UserError: it learns from rewards.
    """
    if session.config.method == "grpo":
        raise UserError("candidates are compared by their validation loss, and --method grpo has none",
                        "give `train --method grpo` a --learning-rate; to tune a training of answers: --method sft")
    return session


@dataclass
class _Job:
    """What a search works with; ``session`` has the settings of a training by one process, ``asked`` its own ones."""

    session: Session
    asked: Session
    settings: TuneConfig
    rows: tuple[Any, Any]
    placement: Placement
    choice: BatchChoice
    candidates: Sequence[Candidate]
    chat: ChatFormat
    shown: Shown | None
    started: float


def _job(session: Session, asked: Session, settings: TuneConfig, started: float) -> _Job:
    train_rows, valid_rows = prepared_sequences(session)
    if not len(valid_rows):
        raise UserError(f"candidates are compared by their validation loss, and {session.run.root} has no validation "
                        "rows", f"keep some aside: {command('prepare', session.run.root, '--valid', '0.1')}")
    sizes = [sizes_of(rows, session.config) for rows in (train_rows, valid_rows)]
    session = _by_one_process(with_batch_size(session, len(sizes[0])))
    start = start_folder(session)
    if settings.ranks and session.config.full:
        raise UserError("--ranks names ranks of adapters, and all weights are trained (full)",
                        "leave --ranks out; or tune an adapter: --no-full")
    if start and settings.ranks and set(settings.ranks) != {session.config.rank}:
        raise UserError(f"the adapter that this run starts from has the rank {session.config.rank}, so there are no "
                        "others to try", "leave --ranks out")
    candidates = candidates_for(session.config, settings)
    if len(candidates) < 2 or not any(c.learning_rate for c in candidates):
        raise UserError(f"there is nothing to choose from: {', '.join(map(str, candidates))}",
                        "name two or more: --learning-rates 1e-4,2e-4, or --ranks 8,16")
    placement = choose_placement(session.config.dtype)
    largest = session.resolved.but({"rank": max(c.rank for c in candidates) or session.config.rank}, {})
    placement, shape, choice = fit(replace(session, resolved=largest), sizes, placement, start=start)
    refuse_what_does_not_fit(choice, session.config, sizes[0].longest, session.listener)
    rows = train_rows, _some(valid_rows, settings.valid_sequences, sequences_of_a_row(session.config))
    chat = chat_format_of(session)
    refuse_start_of_others(start, chat)
    shown = shown_in(session, chat, rows, placement)
    refuse_what_cannot_be_seen(shown, session, shape, choice)
    return _Job(session, asked, settings, rows, placement, choice, candidates, chat, shown, started)


def _by_one_process(session: Session) -> Session:
    """The same training by one process: a step learns from the same rows."""
    config = session.config
    alone = {"num_processes": 1, "strategy": "ddp", "accumulation": config.accumulation * config.num_processes}
    return replace(session, resolved=session.resolved.but(alone, {})) if config.num_processes > 1 else session


def _some(sequences: Any, most: int, of_a_row: int) -> Any:
    """So many sequences, spread over all, those of a row together."""
    if len(sequences) <= most:
        return sequences
    chosen = np.linspace(0, len(sequences) // of_a_row - 1, max(1, most // of_a_row)).round().astype(int)
    rows = (chosen[:, None] * of_a_row + np.arange(of_a_row)).flatten().tolist()
    # A new table: sizes are read from tables, in which a selection still has all rows.
    picked = type(sequences).from_dict(sequences.with_format(None)[rows], features=sequences.features)
    return picked.with_transform(sequences.format["format_kwargs"]["transform"])


def _begun(job: _Job) -> Tuning:
    """The search that was begun with the same data, model and settings, or a new one."""
    session, settings = job.session, job.settings
    tokens = session.manifest.stages["prepare"]["outputs"]["tokens"]["sha256"]
    others = {name: value for name, value in session.config.as_dict().items() if name not in _FREE}
    key = training_key(session.model.fingerprint, tokens, job.chat.template, others | {
        "compute": f"{job.placement.device} {job.placement.short}", "valid_sequences": settings.valid_sequences},
        digest_of(start) if (start := start_folder(session)) else None)
    new = Tuning(key, settings.minutes, list(job.candidates), base=session.model.fingerprint, tokens=tokens)
    earlier = None if session.force else read_tuning(session.run.tuning)
    if earlier is None:
        return new
    if earlier.key != key:
        session.listener.note("an earlier search had other data, another base model or other settings: this one starts "
                              "anew")
        return new
    if (earlier.minutes, set(earlier.candidates)) != (new.minutes, set(new.candidates)):
        new.trials = earlier.trials
        return new
    if not earlier.ended and earlier.trials:
        session.listener.note(f"going on with a search that was interrupted: "
                              f"{counted(len(earlier.trials), 'candidate')} tried so far")
    return earlier


# ---- the search ------------------------------------------------------------------------------------------------------

def _search(job: _Job, tuning: Tuning) -> None:
    from gemma_tune.train.trials import StopTrial, Trials

    session = job.session
    session.listener.note(f"computing in {job.placement.reason}")
    load_libraries()
    session = replace(session, model=with_weights(session.model, session.listener))
    sound = checked_beside(session.model)
    if job.shown:
        look(job.shown, session.model.path, job.placement, sound.result, session.listener)
    try:
        model = load_model(session.model.path, job.placement, four_bit=session.config.qlora,
                           sight="features" if job.shown else "none")
    finally:
        sound.result()
    stop = StopTrial(session.listener)
    progress = _Progress(session.listener)
    with tempfile.TemporaryDirectory() as scratch:  # which the library makes a folder for checkpoints in
        apart = replace(session, run=RunDir(Path(scratch), session.run.model_name))
        trials = Trials(apart, model, job.chat, job.rows, job.placement, job.choice,
                        start_folder(session), stop, progress.step, job.shown)
        with trials, stop:
            _climb(job, tuning, trials, progress)
    tuning.ended = True
    tuning.save(job.session.run.tuning)


def _climb(job: _Job, tuning: Tuning, trials: Any, progress: _Progress) -> None:
    """Rung by rung, as long as there is time and more than one candidate."""
    costs = trials.measure(job.candidates[0])
    tuning.base_loss, tuning.whole = trials.base_loss, trials.steps
    tuning.setup = tuning.setup or time.monotonic() - job.started
    deadline = time.monotonic() + 60 * job.settings.minutes - tuning.setup - tuning.spent
    number = 0
    while True:
        if number == len(tuning.rungs):
            begun = _next(job, tuning, costs, trials.steps, deadline)
            if begun is None:
                break
            tuning.rungs.append(begun)
            tuning.save(job.session.run.tuning)
        rung = tuning.rungs[number]
        if not _try(job, tuning, trials, number, deadline, progress):
            _out_of_time(job, tuning, costs, trials.steps)
            break
        number += 1
        costs = _as_measured(costs, tuning, rung)
        if len(rung.candidates) <= 2 or rung.steps >= trials.steps or len(tuning.ranking(rung)) < 2:
            break


def _next(job: _Job, tuning: Tuning, costs: Costs, most: int, deadline: float) -> Begun | None:
    """The next rung; None where there is no time for one that is longer than the last.

    Raises:
        UserError: not even for the first one.
    """
    left, listener = deadline - time.monotonic(), job.session.listener
    if tuning.rungs:
        rung = tuning.rungs[-1]
        alive = [trial.candidate for trial in tuning.ranking(rung)][:-(-len(rung.candidates) // 2)]
        rungs = plan_rungs(len(alive), left, costs, least=min(most, 2 * rung.steps), most=most,
                           ranks=len({c.rank for c in alive}))
        if not rungs:
            listener.note("there is no time for a longer rung: what was tried decides")
            return None
        return Begun(rungs[0].steps, alive)
    count, rungs = plan(job.candidates, _PLANNED * left, costs, most)
    if not rungs:
        raise _too_short(job, costs, most)
    total = costs.rungs(rungs, len({c.rank for c in job.candidates[:count]}))
    steps = ", ".join(f"{rung.candidates} x {counted(rung.steps, 'step')}" for rung in rungs)
    dropped = "" if count == len(job.candidates) else f" of {len(job.candidates)}, nearest to train's settings"
    listener.note(f"a step takes {_short(costs.step)}, the validation of {counted(len(job.rows[1]), 'sequence')} "
                  f"{_short(costs.evaluation)}: time for {counted(count, 'candidate')}{dropped}, in "
                  f"{counted(len(rungs), 'rung')} ({steps}); about {span(total)}")
    return Begun(rungs[0].steps, list(job.candidates[:count]))


def _try(job: _Job, tuning: Tuning, trials: Any, number: int, deadline: float, progress: _Progress) -> bool:
    """Train a rung's candidates that were not tried yet; whether there was time for all.

    Raises:
        Interrupted: the user stopped it.
    """
    rung, session = tuning.rungs[number], job.session
    waiting = [c for c in rung.candidates if tuning.find(c, rung.steps) is None]
    progress.begin(f"rung {number + 1}: {counted(len(waiting), 'candidate')}", len(waiting) * rung.steps)
    for candidate in sorted(waiting, key=lambda c: c.rank != trials.rank):  # making another adapter takes time
        trial = trials.run(candidate, rung.steps, deadline)
        if trial is not None:
            tuning.add(trial)
            tuning.save(session.run.tuning)
            progress.tried(sum(1 for c in waiting if not tuning.find(c, rung.steps)) * rung.steps)
        if trials.stop.requested:
            raise Interrupted(f"stopped; what was tried so far is kept: {counted(len(tuning.trials), 'trial')}",
                              "repeat the same command to go on from there, without --force")
        if trial is None:
            return False
        came = trial.reason if trial.loss is None else (
            f"validation loss {trial.loss:.4f} after {counted(rung.steps, 'step')}")
        session.listener.note(f"{candidate}: {came}")
    return True


def _as_measured(costs: Costs, tuning: Tuning, rung: Begun) -> Costs:
    """With the time that steps really took."""
    done = [trial for trial in tuning.tried(rung) if trial.loss is not None]
    steps = sum(trial.steps for trial in done)
    if not steps:
        return costs
    evaluations = sum(-(-trial.steps // costs.every) for trial in done) * costs.evaluation
    return replace(costs, step=max(1e-4, (sum(trial.seconds for trial in done) - evaluations) / steps))


def _out_of_time(job: _Job, tuning: Tuning, costs: Costs, most: int) -> None:
    """What follows where time is up in the middle of a rung.

    Raises:
        UserError: not even two candidates were tried.
    """
    rung = tuning.rungs[-1]
    if len(tuning.rungs) == 1 and len(tuning.tried(rung)) < 2:
        done = tuning.tried(rung)
        tuning.rungs.clear()
        tuning.save(job.session.run.tuning)
        took = max([costs.trial(rung.steps), *(trial.seconds for trial in done)])
        raise _too_short(job, replace(costs, step=took / rung.steps), most)
    job.session.listener.note(f"time is up within rung {len(tuning.rungs)}: what was tried before decides")


def _too_short(job: _Job, costs: Costs, most: int) -> UserError:
    minutes = math.ceil(1.2 * (time.monotonic() - job.started + least_seconds(costs, most)) / 6) / 10
    minutes = max(minutes, 1.5 * job.settings.minutes)  # the machine may have been slower for a while
    return UserError(f"--minutes {job.settings.minutes:g} is too short to try two candidates: about {minutes:g} are "
                     f"needed here, where a step takes {_short(costs.step)}",
                     "give it more: " + command("tune", job.session.run.root, "--minutes", f"{minutes:g}"))


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


class _Progress:
    """The steps of a rung, as the listener shows them."""

    def __init__(self, listener: Any):
        self.listener, self.task, self.done, self.total = listener, "", 0, 0

    def begin(self, task: str, total: int) -> None:
        self.task, self.done, self.total = task, 0, total

    def step(self) -> None:
        self.done += 1
        self._tell(min(self.done, self.total - 1))  # a rung ends with its last validation

    def tried(self, waiting: int) -> None:
        """A candidate is at its end, and so many steps are left. One that dropped out has left some out, which are no
        longer a part of the whole: as done they would make all steps look faster than they are."""
        self.total = self.done + waiting
        self._tell(self.done)

    def _tell(self, done: int) -> None:
        if self.task:
            self.listener.progress(self.task, done, self.total)


# ---- the result ------------------------------------------------------------------------------------------------------

def _report(job: _Job, tuning: Tuning, status: str) -> StageReport:
    """Show and write what was found.

    Raises:
        WorkFailed: nothing lowered the validation loss.
    """
    run = job.session.run
    show(tuning, job.session.listener)
    if tuning.decided is None:
        lowest = min(c.learning_rate for c in tuning.candidates)
        raise WorkFailed(f"no candidate lowered the validation loss of {tuning.base_loss:.4f}: the base model knows "
                         "these rows better than what is learned from them, or the rates are too high",
                         f"try lower ones: --learning-rates {lowest / 10:.1g},{lowest / 3:.1g}")
    artifacts = write_results(job.asked, tuning, run)
    tried = {trial.candidate for trial in tuning.tried(tuning.rungs[0])}
    if left := [str(candidate) for candidate in tuning.candidates if candidate not in tried]:
        job.session.listener.warn(f"--minutes {job.settings.minutes:g} left no time for {len(left)} of the "
                                  f"{counted(len(tuning.candidates), 'candidate')} ({'; '.join(left)}): the best is "
                                  "that of the others")
    _, ranked = tuning.decided
    best = ranked[0]
    summary = {"learning_rate": best.learning_rate, **({"rank": best.rank} if best.rank else {}),
               "tuned_steps": best.steps,
               "eval_loss_before": tuning.base_loss, "eval_loss_after": best.loss,
               "candidates": len(tried), "candidates_asked": len(tuning.candidates), "rungs": len(tuning.rungs),
               "trials": [{"learning_rate": t.learning_rate, "rank": t.rank, "rung": number, "steps": t.steps,
                           "eval_loss": t.loss, "seconds": t.seconds, "diverged": tuning.diverged(t)}
                          for number, rung in enumerate(tuning.rungs, start=1) for t in tuning.tried(rung)]}
    return StageReport("tune", status, run.root, summary, artifacts, time.monotonic() - job.started)
