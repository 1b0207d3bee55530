"""Scripts that ``--reward command:…`` runs, as inputs of a stage: where one has changed, its result is stale."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from gemma_tune.config.rewards import Reward
from gemma_tune.rewards.program import words_of
from gemma_tune.run.session import Session

_LARGEST = 1 << 20  # bytes of a script


def reward_files(session: Session, rewards: Iterable[Reward]) -> dict[str, Path]:
    """The files among the words of the reward programs, by input name. One that is not there, seen from here, is where
    the stage's recorded result had it, or the training's."""
    stages, own = session.manifest.stages, type(session.config).section
    recorded = {name: item for stage in ("train", own) if stage in stages
                for name, item in stages[stage]["inputs"].items()}
    found: dict[str, Path] = {}
    for reward in rewards:
        for word in words_of(reward.argument) if reward.kind == "command" else ():
            name = f"reward_{os.path.basename(word)}"
            places = [Path(word), *([session.run.root / recorded[name]["path"]] if name in recorded else [])]
            if place := next(filter(_is_script, places), None):
                found[name if name not in found else f"{name}_{len(found)}"] = place.absolute()
    return found


def _is_script(path: Path) -> bool:
    """Whether it is a text, and no interpreter, of which each machine has its own."""
    try:
        return path.is_file() and path.stat().st_size <= _LARGEST and b"\0" not in path.read_bytes()
    except (OSError, ValueError):
        return False
