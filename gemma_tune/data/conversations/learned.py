"""Whether an assistant's turn is learned, under each of the keys by which programs say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.data.conversations.problems import Problem, quoted

_WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss_mask")  # 1 is learned: what the loss is multiplied by
_SWITCHES = ("train", "training", "trainable", "loss", "learn")  # true is learned
_COVERS = ("mask", "masked")  # true is not learned
_PARTS = "train_detail"  # Axolotl's: which characters of a turn are learned
MARKS = (*_WEIGHTS, *_SWITCHES, *_COVERS, _PARTS)


def is_learned(where: str, turn: Mapping[str, Any], problems: list[Problem]) -> bool:
    """Whether none of the marks of a turn keeps it from being learned; marks that cannot be followed are problems.

    Args:
        where: the turn, for the message.
    """
    learned = True
    for key in MARKS:
        value = turn.get(key)
        if value is None:
            continue
        if key in _WEIGHTS:
            if not isinstance(value, (int, float)) or value not in (0, 1):
                problems.append(Problem("turn_weight", f"{where} has the {key} {quoted(value)}; an answer is learned "
                                                       "or not", "use 0 or 1"))
            learned &= value != 0
        elif key == _PARTS:
            if value not in ("", []):
                problems.append(Problem("turn_weight", f"`{key}` of {where} says which parts of it are learned; an "
                                                       "answer is learned whole or not at all",
                                        f'write "train": true or false in place of `{key}`'))
        else:
            if not isinstance(value, bool):
                problems.append(Problem("turn_weight", f"`{key}` of {where} is {quoted(value)}", "use true or false"))
            learned &= value is not (key in _COVERS)
    return learned
