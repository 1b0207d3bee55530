"""How a run's data was read, for further files that are to be read in the same way."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.config.settings import converted, types_of
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.run.session import Session

HOW_ROWS_ARE_READ = ("columns", "roles", "turn_keys", "delimiter", "take", "allow", "max_rejected")
HOW_ROWS_ARE_LAID_OUT = ("train_on", "max_length", "on_long")


def prepared_as(session: Session, names: Sequence[str] = HOW_ROWS_ARE_READ) -> PrepareConfig:
    """The settings of these names that the run's data was prepared with; the others at their defaults."""
    kinds, before = types_of(PrepareConfig), session.settings_of("prepare")
    return PrepareConfig(**{name: converted(kinds[name], before[name]) for name in names if name in before})
