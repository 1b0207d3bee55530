"""The base model, and what it sees in the pictures of the rows: its towers look once, before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.answers.sight import Seen
from gemma_tune.encoding.eye import Eye
from gemma_tune.models.load import load_model, load_towers
from gemma_tune.models.placement import placed
from gemma_tune.run.pictures import unreadable
from gemma_tune.run.session import Session

LOOKING = "looking at pictures"


def base_that_sees(session: Session, eye: Eye | None, names: Sequence[str]) -> tuple[Any, Seen | None]:
    """The run's base model, and what it sees in pictures; None where there are none.

    Args:
        eye: what they are prepared with, where there are any.
        names: of the pictures' files.

    Raises:
        UserError: the model cannot be loaded, or a picture not be read.
        WorkFailed: what was seen cannot be written.
    """
    checkpoint = session.model.path
    placement = placed(session.config.dtype, checkpoint)
    if eye is None or not names:
        return load_model(checkpoint, placement), None
    seen = Seen(session.run.seen, eye, session.model.fingerprint, placement.dtype)
    if lacking := seen.lacks(names):
        towers = load_towers(checkpoint, placement)
        for done, name in enumerate(lacking, start=1):
            try:
                seen.look(towers, name)
            except OSError as e:
                raise unreadable(session.run, e) from e
            session.listener.progress(LOOKING, done, len(lacking))
        del towers
    return load_model(checkpoint, placement, sight="features"), seen
