"""How a run's data was read, for further files that are to be read in the same way; and what was kept aside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune import samples
from gemma_tune.config.settings import converted, types_of
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session

HOW_ROWS_ARE_READ = ("columns", "roles", "turn_keys", "delimiter", "take", "allow", "new_tokens", "max_rejected")
HOW_ROWS_ARE_LAID_OUT = ("train_on", "max_length", "on_long")
NOTHING_HELD_OUT = "the run has no validation rows to compare on"
_EXAMPLE = f"gemma_tune:samples/{samples.SAMPLE}.jsonl"  # as the manifest has it where it was named


def prepared_as(session: Session, names: Sequence[str] = HOW_ROWS_ARE_READ) -> PrepareConfig:
    """The settings of these names that the run's data was prepared with; the others at their defaults."""
    kinds, before = types_of(PrepareConfig), session.settings_of("prepare")
    return PrepareConfig(**{name: converted(kinds[name], before[name]) for name in names if name in before})


def rows_with_pictures(session: Session, side: str) -> int:
    """How many of the run's rows on one side, ``train`` or ``valid``, have pictures; 0 where their tokens are gone or
    damaged, which is for those to tell who need them."""
    from gemma_tune.encoding.tokens import pictured_rows

    try:
        return pictured_rows(session.run.tokens / f"{side}.arrow")
    except (OSError, ValueError):
        return 0


def is_example(manifest: Manifest) -> bool:
    """Whether the run learned the built-in example, whose held-out questions are asked as well."""
    return (_setting(manifest, "prepare", "data") or [_EXAMPLE]) == [_EXAMPLE]


def nothing_held_out(manifest: Manifest) -> bool:
    """Whether a prepared run has no rows, and no questions, to compare base and tuned model on, and none were named."""
    rows = manifest.stages.get("prepare", {"summary": {}})["summary"].get("valid_rows")
    return rows == 0 and not is_example(manifest) and _setting(manifest, "eval", "data") in (None, "valid")


def _setting(manifest: Manifest, stage: str, name: str) -> Any:
    return manifest.stages.get(stage, {"config": {}})["config"].get(name, {}).get("value")
