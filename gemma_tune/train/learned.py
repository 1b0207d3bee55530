"""Whether a training did what it is for, found out at its end: an adapter that did not is kept apart, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.files import put_in_place
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.run.session import Session
from gemma_tune.train.checkpoints import clear
from gemma_tune.train.effect import AdapterStart, LogitChange, Moved, logit_change
from gemma_tune.train.method import usual_rate
from gemma_tune.train.results import save_adapter
from gemma_tune.train.verdict import (
    KNOWN,
    LOSS,
    advice,
    changes,
    first_loss,
    is_harm,
    likely_cause,
    rose,
    without_effect,
)

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer


def require_learned(session: Session, trainer: GemmaTrainer, chat: ChatFormat, start: AdapterStart,
                    records: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """Say what the training did, on the main process; figures for the summary.

    Args:
        start: the adapter before the first step.
        records: of the log, up to the step whose adapter is in the model.
        steps: of the whole training.

    Raises:
        WorkFailed: it made the model worse, or did nothing. An earlier adapter stays in its place, and the checkpoints
            are not gone on from.
    """
    _refuse_harm(session, trainer.model, chat, records, steps)
    moved = start.moved(trainer.model)
    rows = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
    change = _logit_change(trainer, rows)
    if change and not math.isfinite(change.divergence):
        raise _kept_apart(session, trainer.model, chat, "what it computes now is not finite",
                          f"train again with a lower --learning-rate than {session.config.learning_rate:g}")
    what = without_effect(moved, change, records)
    if what and first_loss(records) >= KNOWN:
        clear(session.run.checkpoints)
        cause, hint = likely_cause(session.config, records, steps, int(sum(trainer.trained[0])),
                                   usual_rate(session, session.config.method))
        raise WorkFailed(f"the training changed nothing: {what}; {cause}{_earlier(session)}", hint)
    _tell(session, moved, change, records)
    return {"adapter_norm": moved.norm, "unchanged_layers": len(moved.still),
            "divergence_from_base": change.divergence if change else None}


def _refuse_harm(session: Session, model: Any, chat: ChatFormat, records: Sequence[Mapping[str, Any]],
                 steps: int) -> None:
    """Keep the adapter of a training that made the model worse apart, and its checkpoints from being gone on from.

    Raises:
        WorkFailed: it did.
    """
    found = rose(records)
    if found is None:
        return
    if not is_harm(found):
        if found.by_chance:
            return
        what, chance = ("lower the loss", "a little") if found.measure is LOSS else ("raise the reward", "so much")
        session.listener.warn(f"the training did not {what}: {found.figures}; {chance} can be chance")
        return
    raise _kept_apart(session, model, chat, found.figures, advice(found, session.config.learning_rate, steps))


def _kept_apart(session: Session, model: Any, chat: ChatFormat, what: str, hint: str) -> WorkFailed:
    """The error of a training whose adapter is not to be used, which lies in a place of its own then."""
    run = session.run
    put_in_place(save_adapter(session, model, chat, run.worse_adapter), run.worse_adapter)
    clear(run.checkpoints)
    return WorkFailed(f"the training made the model worse: {what}; its adapter is kept apart, in {run.worse_adapter}"
                      + _earlier(session), hint)


def _logit_change(trainer: GemmaTrainer, rows: Any) -> LogitChange | None:
    """None where it cannot be found out: of a base in shards each process has a part."""
    if trainer.sharded:
        return None
    try:
        return logit_change(trainer, rows)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        trainer.listener.note("there is no memory to compare the logits of base and trained model")
        return None


def _earlier(session: Session) -> str:
    adapter = session.run.adapter
    return f"; the earlier adapter stays in {adapter}" if adapter.exists() else ""


def _tell(session: Session, moved: Moved, change: LogitChange | None, records: Sequence[Mapping[str, Any]]) -> None:
    changed = moved.layers - len(moved.still)
    whole = ["modules"] if session.config.whole else []
    what = " and ".join([*([] if session.config.full else ["adapted layers"]), *whole])
    parts = [f"{changed} of {moved.layers} {what} changed, by {moved.norm:.3g} together"]
    if change:
        parts.append(f"the answers' divergence from the base model is {change.divergence:.3g} nats per token")
    parts += [loss.figures for loss in changes(records) if not loss.by_chance]
    session.listener.note(f"learned: {'; '.join(parts)}")
    if moved.still:
        why = ", or they moved by less than their type holds" if session.config.whole else ""
        session.listener.note(f"{what} that did not change, as no gradient reached them{why}: {moved.still[0]}"
                              + (", …" if len(moved.still) > 1 else ""))
    if (loss := first_loss(records)) < KNOWN:
        session.listener.note(f"the data were known before the first step: the loss was {loss:.2g} from the beginning, "
                              "so there was little to learn")
