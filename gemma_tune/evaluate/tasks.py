"""``eval --tasks``: benchmarks of lm-evaluation-harness, run on the base and on the tuned model.

The harness gets the loaded model, so both are what ``eval`` compares otherwise as well. It is not among what gemma-tune
depends on: it brings some thirty packages with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import first_line, near
from gemma_tune.run.session import Session

INSTALL = "pip install lm-eval"
_BATCH = 8


def require(names: Sequence[str]) -> None:
    """What can be known of ``--tasks`` before any work.

    Raises:
        UserError: the harness is not installed, or a file is not there.
    """
    if not names:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness, which is not installed",
                        f"{INSTALL}, or --tasks none")
    if missing := [name for name in names if _is_file(name) and not Path(name).expanduser().is_file()]:
        raise UserError(f"there is no file {', '.join(missing)}", "name a task, or the YAML file of one")


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


class Tasks:
    """Benchmarks whose data is loaded, so that what is missing shows before models are.

    Raises:
        UserError: the harness knows no such task.
        WorkFailed: a task's data cannot be had.
    """

    def __init__(self, names: Sequence[str], listener: Listener):
        require(names)
        self._listener = listener
        with _quiet():
            from lm_eval.tasks import TaskManager

            manager = TaskManager()
            known = set(manager.all_tasks)
            unknown = [f"{name}{near(name, known)}" for name in names if not _is_file(name) and name not in known]
            if unknown:
                raise UserError(f"lm-evaluation-harness has no task {', '.join(unknown)}",
                                "lm-eval ls tasks lists them")
            listener.note(f"lm-evaluation-harness: loading {', '.join(names)}")
            try:
                specs = [str(Path(name).expanduser()) if _is_file(name) else name for name in names]
                self._manager, self._tasks = manager, list(_built(manager, specs))
            except Exception as e:  # noqa: BLE001 - in as many ways as tasks can be written and data be missing
                raise WorkFailed(f"lm-evaluation-harness cannot load {', '.join(names)}: {first_line(e)}",
                                 "check the network, HF_ENDPOINT, and the task's name; without --tasks the rest runs"
                                 ) from e

    def run(self, model: Any, chat: Any, limit: int, seed: int, which: str) -> dict[str, dict[str, Any]]:
        """Run them on one model.

        Args:
            limit: examples of each task; 0 for all.
            which: how the model is called.

        Returns:
            By task its figures: ``{"acc": [value, standard error or None]}``.

        Raises:
            WorkFailed: the harness gave up.
        """
        self._listener.note(f"lm-evaluation-harness: the {which} model")
        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            try:
                lm = HFLM(pretrained=model, tokenizer=chat.tokenizer, backend="causal", batch_size=_BATCH)
                found = simple_evaluate(
                    model=lm, tasks=self._tasks, task_manager=self._manager, limit=limit or None, log_samples=False,
                    random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
            except Exception as e:  # noqa: BLE001 - tasks are code of many hands
                raise WorkFailed(f"lm-evaluation-harness failed on the {which} model: {first_line(e)}",
                                 "without --tasks the rest runs; earlier results stay") from e
        return {name: figures for name, results in found["results"].items() if (figures := _figures(results))}


def _built(manager: Any, specs: Sequence[str]) -> Iterator[Any]:
    """The tasks' objects: they keep their data, which so is read once for both models."""
    loaded = manager.load(list(specs))
    inside = {id(task) for group in loaded["groups"].values() for task in group.get_all_tasks()}
    nested = {id(child) for group in loaded["groups"].values() for child in group.get_all_groups()}
    yield from (task for task in loaded["tasks"].values() if id(task) not in inside)
    yield from (group for group in loaded["groups"].values() if id(group) not in nested)


def _figures(results: dict[str, Any]) -> dict[str, list[float | None]]:
    """The harness's keys are ``metric,filter`` and ``metric_stderr,filter``."""
    found = {}
    for key, value in results.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or "," not in key:
            continue
        metric, _, how = key.partition(",")
        if metric.endswith("_stderr") or not math.isfinite(value):
            continue
        error = results.get(f"{metric}_stderr,{how}")
        known = isinstance(error, int | float) and math.isfinite(error)
        found[metric if how == "none" else f"{metric} ({how})"] = [float(value), float(error) if known else None]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs each step, and asks the Hub about what it has; its own remarks are not this command's."""
    logger, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        logger.setLevel(before)
        if parallel is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


def compared(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Both models' figures, by task and metric: ``{"base": [value, error], "tuned": […]}``.

    Args:
        found: by model, what :meth:`Tasks.run` gives.
    """
    return {task: {metric: {"base": value, "tuned": found["tuned"][task][metric]}
                   for metric, value in figures.items() if metric in found["tuned"].get(task, {})}
            for task, figures in found["base"].items()}


def with_files(session: Session) -> tuple[Session, dict[str, Path]]:
    """The session with the tasks' files named as the manifest keeps them, relative to the run; and those files."""
    names = found_names(session)
    kept = tuple(session.run.relative(Path(name)) if _is_file(name) else name for name in names)
    session = replace(session, resolved=replace(session.resolved, config=replace(session.config, tasks=kept)),
                      given=set(session.given) - {"tasks"})
    return session, {f"task_{n}": Path(name) for n, name in enumerate(names) if _is_file(name)}


def found_names(session: Session) -> tuple[str, ...]:
    """The tasks as one names them from here: what was given is so, what the manifest has is relative to the run."""
    here = "tasks" in session.given
    return tuple(name if not _is_file(name) else os.path.expanduser(name) if here else session.run.found(name)
                 for name in session.config.tasks)
