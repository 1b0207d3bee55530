"""The stages for Python: each takes what :func:`open_session` gives, with the settings of its command.

    >>> from gemma_tune.api import open_session, train
    >>> train(open_session("train", "runs/mine", epochs=2)).summary["eval_loss_after"]  # doctest: +SKIP

Importing it loads the libraries that the stages compute with; the command line imports a stage when it runs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma_tune.evaluate.stage import evaluate
from gemma_tune.export.stage import export
from gemma_tune.merge.stage import merge
from gemma_tune.prepare.stage import prepare
from gemma_tune.run.session import Session, open_session
from gemma_tune.train.stage import train
from gemma_tune.train.tune import tune

__all__ = ["IN_ORDER", "Session", "evaluate", "export", "merge", "open_session", "prepare", "train", "tune"]

# The stages of `gemma-tune run`, by their names in the manifest.
IN_ORDER: dict[str, Callable[[Session], Any]] = {
    "prepare": prepare, "train": train, "eval": evaluate, "merge": merge, "export-ollama": export}
