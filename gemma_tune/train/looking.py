"""A training's pictures: each is looked at once, before the first step, and what was seen is kept in files of the run.

What sees does not learn here, so that a picture is the same in each epoch, and what sees it is in memory before the
text model, and not beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.answers.sight import Seen, beside
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import free_unused
from gemma_tune.base.words import counted, gigabytes
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import Eye, blindness, size_of
from gemma_tune.encoding.tokens import pictured, pictures_in
from gemma_tune.lora.layers import TOWERS
from gemma_tune.models.load import load_towers
from gemma_tune.models.towers import auto_class, without_towers
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.pictures import unreadable
from gemma_tune.run.session import Session
from gemma_tune.train import processes

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gemma_tune.models.placement import Placement
    from gemma_tune.train.memory import BatchChoice
    from gemma_tune.train.shape import ModelShape

_SPARE = 100_000_000  # bytes that stay free on the disk


@dataclass(frozen=True)
class Shown:
    """The pictures of a training.

    Attributes:
        names: of their files, each once.
        sides: sequences of the training, and of the validation.
        eye: what they are prepared with.
        seen: what was seen in them, as far as they were looked at.
        run: whose they are.
    """

    names: list[str]
    sides: tuple[Any, Any]
    eye: Eye
    seen: Seen
    run: RunDir

    def inputs(self, ids: torch.Tensor, names: Sequence[Sequence[str]], device: torch.device) -> dict[str, Any]:
        """What the model is given beside rows of ids (rows, length) on the CPU, of which these are the pictures.

        Raises:
            UserError: what was seen is gone or damaged.
            ValueError: the pictures are not those of all soft tokens.
        """
        return beside(self.seen, self.eye, ids, names, device)

    @cached_property
    def pictured(self) -> list[np.ndarray]:
        """Which sequences of the training, and of the validation, have any (bool)."""
        return [pictured(side) for side in self.sides]

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """How many tokens of each sequence, of the training and of the validation, stand for parts of them (int64)."""
        return [_parts(side, self.eye.soft_id) for side in self.sides]

    @property
    def unseen(self) -> list[str]:
        """Names of those that were not looked at yet."""
        return self.seen.lacks(self.names)

    @cached_property
    def share(self) -> list[str]:
        """Those of them that this process is to look at; all processes ask for theirs together."""
        here = processes.place()
        # Of the main one's list: another process may find some that were looked at since.
        return processes.gathered(self.unseen)[0][here.rank::here.count]


def shown_in(session: Session, chat: ChatFormat, rows: tuple[Any, Any], placement: Placement) -> Shown | None:
    """The pictures of a training's and its validation's sequences; None where they have none.

    Raises:
        UserError: the model cannot see them any more.
    """
    names = list(dict.fromkeys(name for side in rows for name in pictures_in(side)))
    if not names:
        return None
    model, run = session.model, session.run
    if chat.eye is None:
        raise UserError(f"the prepared rows have pictures, and {blindness(model.path, chat.tokenizer)}",
                        f"prepare them again: {command('prepare', run.root, '--force')}")
    chat.eye.folder = run.pictures
    seen = Seen(run.seen, chat.eye, model.fingerprint, placement.dtype)
    return Shown(names, rows, chat.eye, seen, run)


def _parts(side: Any, soft_id: int) -> np.ndarray:
    import numpy as np

    found = [np.zeros(0, np.int64)]
    for chunk in side.data.column("input_ids").chunks:
        before = np.concatenate([[0], np.cumsum(chunk.values.to_numpy() == soft_id)])  # each token
        found.append(np.diff(before[chunk.offsets.to_numpy()]))
    return np.concatenate(found)


# ---- before any work -------------------------------------------------------------------------------------------------

def refuse_what_cannot_be_seen(shown: Shown | None, session: Session, shape: ModelShape, choice: BatchChoice) -> None:
    """Before weights are loaded: whether all pictures can be looked at, and what is seen in them be kept.

    Raises:
        UserError: a picture is gone or damaged, the model is to be divided among processes, or what sees does not fit
            the memory.
        WorkFailed: the disk is too full.
    """
    if shown is None:
        return
    if session.config.shards > 1:
        raise UserError("--strategy fsdp does not go with pictures: what sees them is not divided among processes",
                        "leave --strategy out; --qlora keeps the weights in 4 bits instead")
    if not (unseen := shown.unseen):
        return
    _refuse_full_disk(shown, unseen, shape)
    towers = tower_bytes(session.model.path, shape.item)
    if towers > choice.available:
        raise UserError(f"what the model sees pictures with needs {gigabytes(towers)} of memory, and "
                        f"{gigabytes(choice.available)} are available", "take a smaller model, or close other programs")


def _refuse_full_disk(shown: Shown, unseen: Sequence[str], shape: ModelShape) -> None:
    deep = len(shown.eye.config["vision_config"].get("deepstack_visual_indexes") or ())
    tokens = sum(_soft_tokens(shown, name) for name in unseen)
    need, free = tokens * shape.hidden * shape.item * (1 + deep), shutil.disk_usage(shown.run.root).free
    if need + _SPARE > free:
        raise WorkFailed(f"what is seen in {counted(len(unseen), 'picture')} takes {gigabytes(need)}, and "
                         f"{gigabytes(free)} are free on the disk of {shown.run.root}",
                         "free some space, or work on another disk with --run DIR; nothing was changed")


def _soft_tokens(shown: Shown, name: str) -> int:
    path = shown.run.pictures / name
    try:
        path.stat()  # sizes are remembered, also of what is gone by now
        size = size_of(path)
    except OSError as e:
        raise unreadable(shown.run, e) from e
    return shown.eye.written(size).count(shown.eye.tokens.soft)


@cache
def tower_bytes(checkpoint: Path, item: int) -> int:
    """What a model sees with takes so many bytes, with numbers of ``item`` bytes; the weights need not be there."""
    import torch

    from gemma_tune.models.known import known_config

    config = known_config(checkpoint)
    with without_towers(config, sees=True), torch.device("meta"):
        model = auto_class(config.model_type, sees=True).from_config(config, trust_remote_code=False)
    return item * sum(p.numel() for name, p in model.named_parameters() if TOWERS.search(name))


def described(shown: Shown, checkpoint: Path, item: int) -> str:
    """What there is to look at, in a line."""
    unseen = len(shown.unseen)
    if not unseen:
        return f"{counted(len(shown.names), 'picture')}, all looked at before"
    return (f"{counted(len(shown.names), 'picture')}, {unseen:,} of them to be looked at, once, before the first step; "
            f"what sees takes {gigabytes(tower_bytes(checkpoint, item))} for that")


# ---- looking ---------------------------------------------------------------------------------------------------------

def look(shown: Shown, checkpoint: Path, placement: Placement, refuse_bad_weights: Callable[[], Any],
         listener: Listener) -> None:
    """Look at this process's share of the pictures, wait until all are done, and free what saw them.

    What was looked at is kept: after an interruption it goes on from there.

    Args:
        refuse_bad_weights: finds out whether the weights are what they were, in the main process at least.

    Raises:
        UserError: a picture cannot be read, or the processes do not see each other's files.
        WorkFailed: what was seen cannot be kept.
    """

    names = shown.share
    if not processes.most(len(names)):
        return
    try:
        towers = load_towers(checkpoint, placement) if names else None
    finally:  # as of the whole model, and before anything is kept of what bad weights see
        refuse_bad_weights()
    processes.wait_for_all()  # the main one has found out
    for done, name in enumerate(names, start=1):
        try:
            shown.seen.look(towers, name)
        except OSError as e:
            raise unreadable(shown.run, e) from e
        listener.progress("looking at pictures", done, len(names))
    del towers
    free_unused(placement.device)
    processes.wait_for_all()
    if missing := shown.unseen:
        raise UserError(f"what another process saw in {missing[0]} is not in {shown.seen.folder}",
                        "let the run's directory lie where all machines of the training reach it")
