"""``--report-to``: the log of a training as TensorBoard, W&B, MLflow and others show it.

The programs are told by transformers' own integrations what ``logs/metrics.jsonl`` holds and nothing else, each record
at its own step: the Trainer by itself would say other numbers, and on a GPU a step late. They get the settings of this
training for its arguments, of which most have nothing to do with what is computed here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from gemma_tune import __version__
from gemma_tune.base import shell
from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.secrets import redacted
from gemma_tune.base.words import first_line
from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.callbacks import MetricsLog
from gemma_tune.train.checkpoints import Training

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer

# Where programs write files, by the variables that they read; what a user has set stays.
_PLACES = {
    "wandb": {"WANDB_DIR": "{logs}", "WANDB_RUN_ID": "{id}", "WANDB_RESUME": "allow"},
    "trackio": {"TRACKIO_DIR": "{logs}/trackio"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{logs}/mlflow.db"},
    "swanlab": {"SWANLAB_LOG_DIR": "{logs}/swanlab"},
    "comet_ml": {"COMET_OFFLINE_DIRECTORY": "{logs}/comet"},
}
_OWN = ("on_init_end", "on_train_begin", "on_train_end", "on_log")  # events that are told otherwise than they come
_AXES = ("step", "steps")


def _to_stderr(method: Callable[..., Any]) -> Callable[..., Any]:
    """What the programs print in it goes there: standard output carries results alone."""
    @functools.wraps(method)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return method(*args, **kwargs)

    return redirected


class Reports(TrainerCallback):
    """Tells programs of each record of the log, and passes on what else the Trainer says.

    It begins before the first evaluation, which the Trainer's own order comes too late for, and ends with the training.
    A program that fails in between is told nothing more: no training is lost for it. Of several processes the main one
    reports.

    Args:
        session: its settings are reported.
        log: whose records are reported; those that it has already were reported before an interruption.
    """

    def __init__(self, session: Session, training: Training, log: MetricsLog):
        self.log, self.listener, self.training = log, session.listener, training
        self.names: Sequence[str] = session.config.report_to if processes.is_main() else ()
        self.run_name = f"{session.run.root.resolve().name}-{training.id[:8]}"
        self.logs = session.run.metrics.parent
        self.settings = _settings(session, training)
        self.trainer: GemmaTrainer | None = None
        self._callbacks: dict[str, TrainerCallback] = {}
        self._told = len(log.records)
        self._restored = contextlib.ExitStack()

    @_to_stderr
    def __enter__(self) -> Reports:
        """Begin, with the trainer that was set.

        Raises:
            WorkFailed: one of the programs cannot, such as without a login.
        """
        for name in dict.fromkeys(self.names):
            self._restored.enter_context(_environment(self._variables(name)))
            try:
                self._callbacks[name] = self._made(name)
                for event in ("on_init_end", "on_train_begin"):
                    self._say(name, event, self._state(self.log.first_step))
            except Exception as e:  # noqa: BLE001 - each has errors of its own
                self._callbacks.pop(name, None)
                self._end()
                raise WorkFailed(f"--report-to {name} does not work here: {first_line(e)}",
                                 "put that right, or leave it out of --report-to; nothing was trained yet") from e
            self.listener.note(f"reporting to {name}{self._where(name)}")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @_to_stderr
    def _end(self) -> None:
        self._pass_on("on_train_end", self._state())
        if "wandb" in self._callbacks:  # its integration leaves the run open, and the next training would go on in it
            with contextlib.suppress(Exception):
                sys.modules["wandb"].finish()
        self._callbacks.clear()
        self._restored.close()

    def _made(self, name: str) -> TrainerCallback:
        if name == "tensorboard":
            return INTEGRATION_TO_CALLBACK[name](tb_writer=_event_writer(self._event_folder, self.log.first_step))
        return INTEGRATION_TO_CALLBACK[name]()

    @property
    def _event_folder(self) -> Path:
        return Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or self.logs / "tensorboard") / self.run_name

    def _variables(self, name: str) -> dict[str, str]:
        return {variable: value.format(logs=self.logs.resolve().as_posix(), id=self.training.id)
                for variable, value in _PLACES.get(name, {}).items()}

    def _where(self, name: str) -> str:
        if name == "tensorboard":
            folder = self._event_folder
            return f", in {folder}; to watch: tensorboard --logdir {shell.quote(str(folder.parent))}"
        places = [f"{variable}={os.environ[variable]}" for variable, value in _PLACES.get(name, {}).items()
                  if "{logs}" in value]
        return f", with {', '.join(places)}" if places else ""

    # ---- events ------------------------------------------------------------------------------------------------------

    def _event(self, event, args, state, control, **kwargs) -> None:
        self._pass_on(event, state, **kwargs)
        if event == "on_evaluate":
            self._report()

    def on_log(self, args, state, control, **kwargs) -> None:
        """Report what the log has made of it; the log comes before this one."""
        self._report()

    def _report(self) -> None:
        news, self._told = self.log.records[self._told:], len(self.log.records)
        for record in news if self._callbacks else ():
            values = {name: value for name, value in record.items()
                      if name not in _AXES and isinstance(value, int | float | str)}
            self._pass_on("on_log", self._state(record["step"], record.get("epoch")), logs=values)

    def _state(self, step: int | None = None, epoch: float | None = None) -> Any:
        """The Trainer's state as it was after that step."""
        assert self.trainer is not None
        state = copy.copy(self.trainer.state)
        state.max_steps = self.trainer.args.max_steps
        state.global_step = state.global_step if step is None else step
        state.epoch = state.epoch if epoch is None else epoch
        return state

    @_to_stderr
    def _pass_on(self, event: str, state: Any, **kwargs: Any) -> None:
        for name in list(self._callbacks):
            try:
                self._say(name, event, state, **kwargs)
            except Exception as e:  # noqa: BLE001 - a server that is down is no reason to lose a training
                del self._callbacks[name]
                self.listener.warn(f"{name} is told nothing more, as it failed: {first_line(e)}; the training goes on, "
                                   f"and {self.log.path} has everything")

    def _say(self, name: str, event: str, state: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        known = {"model": trainer.model, "processing_class": trainer.processing_class}
        getattr(self._callbacks[name], event)(self._arguments(name), state, trainer.control, **known | kwargs)

    def _arguments(self, name: str) -> Any:
        assert self.trainer is not None
        args = copy.copy(self.trainer.args)
        args.run_name, args.report_to = self.run_name, list(self.names)
        if name == "codecarbon":  # which writes beside the checkpoints
            args.output_dir = str(self.logs)
        args.to_dict = lambda: dict(self.settings)
        return args


for _name in (name for name in vars(TrainerCallback) if name.startswith("on_") and name not in _OWN):
    setattr(Reports, _name, functools.partialmethod(Reports._event, _name))


def _settings(session: Session, training: Training) -> dict[str, Any]:
    """What the training is made with: every setting, the model, and what was found out for ``auto``."""
    device, dtype = training.compute.split()
    settings = session.config.as_dict()
    del settings["report_to"]
    return redacted(settings | {"model": session.model.id, "revision": session.model.revision, "device": device,
                                "dtype": dtype, "effective_batch": session.config.effective_batch,
                                "gemma_tune": __version__})


def _event_writer(folder: Path, first_step: int) -> Any:
    """TensorBoard's; where the training goes on, what was written of later steps before no longer counts."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # transformers takes this one as well
        from tensorboardX import SummaryWriter
    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
