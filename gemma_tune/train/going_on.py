"""How a training begins: anew, from an adapter, where it was interrupted, or at the end of a finished one.

A finished training goes on (``--continue``) from its last checkpoint, as if it had been longer from the beginning: with
the optimiser's state, the order of the rows and the random numbers that it had there. Only the learning rate is that of
the longer schedule from now on. Where that checkpoint is gone, what is left is the adapter: it is trained for the steps
that are missing, with a fresh optimiser and a schedule of their own.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.config.settings import as_flags, in_words, said_by, same_result
from gemma_tune.config.stages import AUTO, TrainConfig
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.start import digest_of, modules_of, weights_of
from gemma_tune.models.placement import Placement, choose_placement
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import other_settings, settings_then
from gemma_tune.run.state import state_of
from gemma_tune.run.stopped import has_other_rows, read_marker, step_of, unfinished, whole
from gemma_tune.train.checkpoints import (
    Training,
    difference,
    find_resumable,
    last_of,
    learned_from_other_rows,
    training_key,
)
from gemma_tune.train.method import with_method
from gemma_tune.train.plan import rate_at, total_steps
from gemma_tune.train.start import start_folder, warn_of_what_is_replaced, with_start
from gemma_tune.train.verdict import measure_of

if TYPE_CHECKING:
    from gemma_tune.train.best import Best

# What a longer training may have otherwise than the part that is done.
MAY_CHANGE = ("epochs", "max_steps", "learning_rate", "schedule", "warmup", "eval_steps", "save_steps", "keep",
              "early_stopping")


@dataclass(frozen=True)
class Beginning:
    """What a training begins with.

    Attributes:
        checkpoint: what it goes on from, or None.
        start: directory of the adapter that it started from, or does now; None where that is zero.
    """

    training: Training
    placement: Placement
    checkpoint: Path | None
    start: Path | None


@dataclass(frozen=True)
class Continuation:
    """How a finished training goes on.

    Attributes:
        checkpoint: its last one, or None where only its adapter is left.
        before: what the checkpoint says of it; without one ``compute`` and ``micro_batch``, from the manifest.
        done: steps that it had; ``total``, how many there will be.
        said: in one sentence, with the learning rates.
    """

    checkpoint: Path | None
    before: Mapping[str, Any]
    done: int
    total: int
    said: str

    @property
    def steps_before(self) -> int:
        """See :class:`Training`."""
        return self.before["steps_before"] if self.checkpoint else self.done


def as_before(session: Session, go_on: bool = False, writes: bool = True,
              ) -> tuple[Session, dict[str, Any] | None, dict[str, Path]]:
    """The session with the settings of an interrupted training, of the method, and of the adapter that it starts from;
    that training's marker; and the adapter's files.

    Args:
        go_on: ``--continue``.
        writes: see ``with_start``.

    Raises:
        UserError: the interrupted training cannot go on with the data of now, and is not to start anew either.
    """
    waiting = unfinished(session.run.checkpoints, session.manifest.finished_trainings)
    if waiting and has_other_rows(session.run, session.manifest, waiting):
        if not session.force:
            raise learned_from_other_rows(session.run, waiting, session.manifest.kind)
        waiting = None
    session = with_method(_as_interrupted(session, waiting))
    session, start = with_start(session, waiting and waiting["settings"], writes, go_on)
    if not waiting:
        warn_of_what_is_replaced(session)
    return session, waiting, start


def _as_interrupted(session: Session, waiting: dict[str, Any] | None) -> Session:
    """An interrupted training is newer than the run's last result: what is not said now is as it was there."""
    if waiting is None:
        return session
    now, passing = session.config.as_dict(), {*same_result(TrainConfig), *said_by(TrainConfig, session.given)}
    then = waiting["settings"]
    outdone = session.config.outdone(session.given, {name: {"value": value} for name, value in then.items()})
    before = {name: value for name, value in then.items() if name in now and name not in outdone
              and (name not in passing or now[name] == AUTO) and value != now[name]}
    said = {name: value for name, value in before.items() if name != "method" or now[name] != AUTO}
    if said:
        session.listener.note(f"settings of the interrupted training: {in_words(said)}")
    if before:
        before = {name: tuple(value) if isinstance(value, list) else value for name, value in before.items()}
        session = replace(session, resolved=session.resolved.but(before, _origins(session, waiting, before)))
    return session


def _origins(session: Session, waiting: Mapping[str, Any], names: Collection[str]) -> dict[str, dict[str, str]]:
    """Of settings of the interrupted training: what nobody gave for it is not recorded as given, or a later training
    of other data would have it, too, such as the method."""
    now = {**session.resolved.origins, "method": "data"}
    return {name: {"from": "flag" if name in waiting["asked"] else now[name]} for name in names}


def begin(session: Session, content: Sequence[str], rows: int, go_on: bool) -> Beginning:
    """Decide how a training begins, and say so.

    Args:
        content: fingerprints of base model and rows, and the chat template with new tokens, see ``training_key``.
        rows: number of training sequences.
        go_on: ``--continue``.

    Raises:
        UserError: an interrupted training with other settings or data is there, or one that goes on cannot.
    """
    run, listener, finished = session.run, session.listener, session.manifest.finished_trainings
    settings, waiting = session.config.as_dict(), unfinished(run.checkpoints, finished)
    if session.force:
        if waiting:
            listener.warn(f"--force starts anew: {whole(run.checkpoints)[-1].name} of an interrupted training is lost "
                          "when the first step begins; without --force it goes on")
        return _anew(session, content)
    start = _start(session, waiting["steps_before"] if waiting else 0)
    key = _key(session, content, start)
    continues = go_on or bool(waiting and waiting["earlier"])
    checkpoint = find_resumable(run.checkpoints, key, finished, settings, listener, *(
        ["the training goes on from the end of the finished one"] if continues else []))
    if checkpoint:
        listener.note(f"going on from {checkpoint.name}, where an earlier training stopped")
        training = Training.of(read_marker(checkpoint) or {}, key, settings)
        placement = _placement(session, training.compute, "interrupted")
        training = replace(training, compute=compute_of(placement), asked=_asked(session))
        return Beginning(training, placement, checkpoint, start)
    return _at_the_end(session, content, rows) if continues else _anew(session, content)


def _anew(session: Session, content: Sequence[str]) -> Beginning:
    start, placement = start_folder(session), choose_placement(session.config.dtype)
    return Beginning(Training(uuid.uuid4().hex, _key(session, content, start), session.config.as_dict(),
                              compute_of(placement), rows=content[1], asked=_asked(session)), placement, None, start)


def _at_the_end(session: Session, content: Sequence[str], rows: int) -> Beginning:
    found = continuation(session, rows)
    (session.listener.note if found.checkpoint else session.listener.warn)(found.said)
    summary = session.manifest.stages["train"]["summary"]
    placement = _placement(session, found.before["compute"], "finished")
    start = _start(session, found.steps_before)
    training = Training(uuid.uuid4().hex, _key(session, content, start), session.config.as_dict(),
                        compute_of(placement), found.before["micro_batch"], session.manifest.finished_trainings,
                        found.steps_before, content[1], _figures_before(found, summary), _asked(session))
    return Beginning(training, placement, found.checkpoint, start)


def _figures_before(found: Continuation, summary: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Training`."""
    names = ("tokens", "training_seconds", "eval_loss_before", "train_loss_first", *(
        ("eval_reward_before", "train_reward_first") if "eval_reward_before" in summary else ()))
    known = found.before["before"] if found.checkpoint else {name: summary.get(name) for name in names}
    return {**known, "steps": found.done}


def _start(session: Session, steps_before: int) -> Path | None:
    return session.run.adapter if steps_before else start_folder(session)


def _key(session: Session, content: Sequence[str], start: Path | None) -> str:
    base, rows, template = content
    return training_key(base, rows, template, session.config.as_dict(), digest_of(start) if start else None)


def _asked(session: Session) -> tuple[str, ...]:
    return tuple(sorted(session.resolved.given))


def compute_of(placement: Placement) -> str:
    return f"{placement.device} {placement.short}"


def _placement(session: Session, compute: str, which: str) -> Placement:
    """Device and type of a training that began with ``compute``, which it stays with."""
    short, asked = compute.split()[1], session.config.dtype
    placement = choose_placement(short if asked == AUTO else asked)
    if asked == AUTO:
        placement = replace(placement, reason=f"{short} on {placement.device}, as the training began")
    if short != placement.short:
        raise UserError(f"the {which} training computed in {short}, and --dtype asks for {placement.short}",
                        f"leave --dtype out to {'finish it' if which == 'interrupted' else 'go on'}, or start anew "
                        "with --force")
    return placement


# ---- a finished training ---------------------------------------------------------------------------------------------

def as_finished(session: Session) -> Session:
    """The same, with the batch size that the finished training had where it is left to us."""
    size = session.manifest.stages.get("train", {"summary": {}})["summary"].get("batch_size")
    if session.config.batch_size != AUTO or size is None:
        return session
    return replace(session, resolved=session.resolved.but({"batch_size": size}, {}))


def nothing_new(session: Session, manifest: Manifest) -> bool:
    """Whether the finished training is what is asked for now."""
    record = manifest.stages.get("train")
    return bool(record and state_of(session.run, manifest, "train").status == "done"
                and not other_settings(record, session.config))


def offer(session: Session) -> str | None:
    """The command that goes on from the finished training, where that makes what is asked for now; else None."""
    manifest = session.manifest
    if "train" not in manifest.stages or state_of(session.run, manifest, "train").status != "done" or _lost(session):
        return None
    before, now = _recorded(session), as_finished(session).config.as_dict()
    if now["max_steps"]:
        longer = now["max_steps"] > (before["max_steps"] or _done(session))
    else:
        longer = before["max_steps"] > 0 or now["epochs"] > before["epochs"]
    if not longer or difference(before, now, MAY_CHANGE):
        return None
    return command("train", session.run.root, "--continue", *as_flags(
        TrainConfig, {name: now[name] for name in MAY_CHANGE if now[name] != before[name]}, defaults=True))


def _lost(session: Session) -> list[str]:
    """What the manifest does not have of the finished training, though each has it."""
    summary = session.manifest.stages["train"]["summary"]
    return [name for name in ("steps", "device", "dtype") if summary.get(name) is None]


def _done(session: Session) -> int:
    """Steps of the finished training, and of those that it went on from."""
    return session.manifest.stages["train"]["summary"]["steps"]


def _shift(summary: Mapping[str, Any]) -> int:
    """``steps_before`` of the :class:`Training` that the summary is of."""
    return summary.get("counted_after", 0)


def _recorded(session: Session) -> dict[str, Any]:
    """Settings of the finished training, with the batch size that it came to."""
    record = session.manifest.stages["train"]
    size = record["summary"].get("batch_size")
    return settings_then(record, TrainConfig) | ({"batch_size": size} if size else {})


def continuation(session: Session, rows: int) -> Continuation:
    """How the run's finished training goes on with the settings of now; nothing is written.

    Raises:
        UserError: there is none, its data or its model changed, or settings that cannot change have; or there is
            nothing left to do.
    """
    run, manifest = session.run, session.manifest
    if not manifest.finished_trainings:
        raise UserError(f"{run.root} has no finished training that could go on",
                        f"train first, without --continue: {command('train', run.root)}")
    state, config = state_of(run, manifest, "train"), session.config
    if state.status == "stale":
        raise UserError(f"--continue goes on with the same data and base model, but {state.reason}",
                        "leave --continue out to start anew; or start from the adapter: "
                        + command("train", run.root, "--from-adapter", str(run.adapter)))
    summary, before = manifest.stages["train"]["summary"], _recorded(session)
    if lost := _lost(session):
        raise UserError(f"{run.manifest} does not have {' and '.join(lost)} of the finished training any more",
                        "leave --continue out to start anew; or start from the adapter: "
                        + command("train", run.root, "--from-adapter", str(run.adapter)))
    done, total = _done(session), total_steps(rows, config)
    problems = difference(before, config.as_dict(), MAY_CHANGE)
    problems += [_too_short(config, total, done)] if total <= done else []
    if problems:
        raise UserError("the finished training cannot go on with these settings",
                        f"with --continue give {'a larger --max-steps' if config.max_steps else 'more --epochs'}, and "
                        "what differs as it was; without it the training starts anew", problems)
    checkpoint = last_of(run.checkpoints, manifest.finished_trainings, session.listener)
    if checkpoint is None and state.status != "done":
        raise UserError(f"nothing is left that could go on: no checkpoint of the finished training, and of its adapter "
                        f"{state.reason}", "leave --continue out to start anew")
    _refuse_stopped_early(session, checkpoint)
    worked = read_marker(checkpoint) if checkpoint else {
        "compute": f"{summary['device']} {summary['dtype']}", "micro_batch": summary.get("micro_batch") or 0}
    found = Continuation(checkpoint, worked or {}, done, total, "")
    old = replace(config, **{name: before[name] for name in MAY_CHANGE})
    return replace(found, said=_said(found, summary, old, config, rows))


def _too_short(config: TrainConfig, total: int, done: int) -> str:
    if config.max_steps and total == config.max_steps:
        return f"max_steps: {total} are done already, raise it or set it to 0 (the finished training had {done})"
    return f"epochs: {config.epochs:g} are {counted(total, 'step')}, and the finished training had {done}"


def _refuse_stopped_early(session: Session, checkpoint: Path | None) -> None:
    """Where ``--early-stopping`` has ended a training, the same number would end its continuation at once."""
    from gemma_tune.train.best import Best
    from gemma_tune.train.callbacks import earlier_records

    if checkpoint is None or not (patience := session.config.early_stopping):
        return
    records = earlier_records(session.run.metrics, step_of(checkpoint))
    if Best(session.run.checkpoints, "", Listener(), keeps=False, patience=patience, earlier=records,
            measure=measure_of(session.config)).exhausted:
        raise UserError(f"--early-stopping {patience} has ended the finished training, and would end it again at once",
                        "go on with a larger number, or with --early-stopping 0")


def _said(found: Continuation, summary: Mapping[str, Any], old: TrainConfig, new: TrainConfig, rows: int) -> str:
    shift = _shift(summary)
    was = old.learning_rate * rate_at(found.done - shift - 1, total_steps(rows, old) - shift, old)
    left = found.total - found.steps_before
    first = step_of(found.checkpoint) if found.checkpoint else 0
    now, last = (new.learning_rate * rate_at(step, left, new) for step in (first, left - 1))
    rates = (f"the learning rate was {was:.3g} in its last step, and is {now:.3g} in the next one and {last:.3g} in "
             "the last one")
    if found.checkpoint is None:
        step = summary.get("kept_step", found.done)
        kept = "" if step == found.done else f", that of step {step},"
        return (f"no checkpoint of the finished training is left: going on from its adapter{kept} with a fresh "
                f"optimiser, for the {counted(left, 'step')} missing of {found.total}, on the {new.schedule} "
                f"schedule of so many; {rates}")
    again = found.done - shift - first
    return (f"going on from {found.checkpoint.name} of the finished training to step {left}, on the {new.schedule} "
            f"schedule of all {left} steps; {rates}"
            + (f"; no later checkpoint is left, so its last {counted(again, 'step')} are done again" if again else ""))


def keep_what_is_best(session: Session, training: Training, best: Best) -> None:
    """The best adapter so far of a training that goes on is the one that the run has, and may stay the best."""
    summary = session.manifest.stages.get("train", {"summary": {}})["summary"]
    step, value = summary.get("kept_step", summary.get("steps")), summary.get(f"{best.measure.key}_after")
    if not (training.earlier and best.lacks_file) or step is None or value is None or (
            _shift(summary) != training.steps_before):
        return
    adapter = read_adapter(session.run.adapter)
    own = (*adapter.layers, *modules_of(adapter), *adapter.rows)
    best.keep(step - training.steps_before, best.measure.sign * value, weights_of(adapter, dict(zip(own, own))))
