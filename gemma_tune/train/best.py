"""The adapter whose validation loss is the lowest of a training, or whose reward is the highest, and an end where it
does not get better any more."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from gemma_tune.base.files import NEW, os_errors, put_in_place, unfinished
from gemma_tune.base.listener import Listener
from gemma_tune.lora.layers import trained_weights
from gemma_tune.train import processes
from gemma_tune.train.checkpoints import BEST, KEEP, rotate
from gemma_tune.train.verdict import LOSS, Measure, validation_losses

if TYPE_CHECKING:
    from torch import Tensor

    from gemma_tune.train.trainer import GemmaTrainer


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes and numbers, as hex digits."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Best(TrainerCallback):
    """Keeps the adapter of each evaluation that is lower than all before it, in a file beside the checkpoints; of
    rewards also of one that is as good, as what was learned since then is worth having.

    The loss before the first step is the base model's, which no adapter is kept for.

    Args:
        folder: where checkpoints lie; of several processes only the main one writes.
        training: its id. A file of another one does not count.
        keeps: whether the best is to be kept; else only the end is looked after.
        patience: evaluations in a row without a lower loss after which the training ends; 0 for none.
        earlier: records of the log up to the checkpoint that training goes on from.
        checkpoints: how many of them stay, that of the best step among them.
        before: steps that the adapter had which the training starts from; that one may be the best as well.
        first: the base model's loss, where this training began with another; of rewards as they are.
        measure: what is the lowest, or the highest: then losses here are rewards with their sign turned.
    """

    def __init__(self, folder: Path, training: str, listener: Listener, *, keeps: bool, patience: int,
                 earlier: Sequence[Mapping[str, Any]] = (), checkpoints: int = KEEP, before: int = 0,
                 first: float | None = None, measure: Measure = LOSS):
        self.path, self.training, self.listener = folder / BEST, training, listener
        self.keeps, self.patience, self.checkpoints, self.before = keeps, patience, checkpoints, before
        self.first = None if first is None else measure.sign * first
        self.measure = measure
        self.trainer: GemmaTrainer | None = None
        self.losses = validation_losses(earlier, measure)
        self._kept = self._of_file()
        self._told = False

    @property
    def exhausted(self) -> bool:
        """Whether the loss was not lower for too long."""
        if not (self.patience and self.losses):
            return False
        levels = {step: self.measure.level(loss) for step, loss in self.losses.items()}
        first = min(levels, key=lambda step: (levels[step], step))
        return sum(step > first for step in levels) >= self.patience

    def on_save(self, args, state, control, **kwargs):
        if processes.is_main():
            rotate(self.path.parent, self.checkpoints, self._kept[0] if self.keeps and self._kept else None)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        step, loss = state.global_step, self.measure.sign * metrics[self.measure.key]
        name, best_one, shown = self.measure.name, self.measure.best, self.measure.shown
        self.losses[step] = loss
        if (step or self.before) and self.keeps and self._is_better(loss):
            assert self.trainer is not None
            self.keep(step, loss, trained_weights(self.trainer.model))
        elif step and not self._told and (best := self.measure.lowest(self.losses)) != step:
            self.listener.note(f"the validation {name} is {shown(loss)} after step {self.before + step}, and was "
                               f"{best_one} {self._when(best)}: {shown(self.losses[best])}")
            self._told = True
        if self.exhausted and step < state.max_steps:
            self.listener.note(f"--early-stopping {self.patience}: the training ends after step {self.before + step} "
                               f"of {self.before + state.max_steps}; so many times in a row the validation {name} was "
                               f"not {self.measure.better}")
            control.should_training_stop = control.should_save = True  # a later --continue goes on from here
        return control

    def _is_better(self, loss: float) -> bool:
        """Whether a loss takes the place of the one that is kept."""
        new, old = map(self.measure.level, (loss, self._kept[1] if self._kept else math.inf))
        return new < old or self.measure.later and new == old < math.inf

    def _when(self, step: int) -> str:
        return f"after step {step}" if (step := self.before + step) else "before the first step"

    @property
    def lacks_file(self) -> bool:
        """Whether the best is to be kept, and no file has one."""
        return self.keeps and self._kept is None

    def keep(self, step: int, loss: float, trained: Mapping[str, Tensor]) -> None:
        """Keep these weights as the best, by the names of the model's parameters."""
        if processes.is_main():
            weights = {name: value.detach().float().cpu().contiguous() for name, value in trained.items()}
            # With their hash, as everything that training may go on from.
            about = {"training": self.training, "step": str(step), "loss": repr(loss), "sha256": _digest(weights)}
            with os_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with unfinished(self.path.with_name(NEW + self.path.name)) as fresh:
                    save_file(weights, fresh, about)  # of all weights of a model no second copy is in memory
                    put_in_place(fresh, self.path)
        self._kept = step, loss

    def _of_file(self) -> tuple[int, float] | None:
        """Step and loss of what an interrupted part of this training kept."""
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
            return (int(about["step"]), float(about["loss"])) if about["training"] == self.training else None
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def restore(self, last: int) -> int:
        """Put the best adapter into the model, where it is not the last one.

        Args:
            last: the training's last step.

        Returns:
            The step after which the model's adapter was so.
        """
        if not (self.keeps and self._kept) or self._kept[0] == last:
            return last
        step, _ = self._kept
        assert self.trainer is not None
        if not processes.is_main():
            return step
        weights = self._read()
        if weights is None:
            self.listener.warn(f"the weights of step {step}, whose validation {self.measure.name} was "
                               f"{self.measure.best}, cannot be read from {self.path}: those of the last step stay")
            return last
        for name, value in trained_weights(self.trainer.model).items():
            value.copy_(weights[name])
        return step

    def _read(self) -> dict[str, Any] | None:
        try:
            with safe_open(self.path, framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}
                wanted = (file.metadata() or {})["sha256"]
        except (OSError, KeyError, SafetensorError):
            return None
        return weights if _digest(weights) == wanted else None

    def described(self, kept: int, last: int, length: str) -> str | None:
        """Which adapter it is and what that says, in one sentence; None where nothing was evaluated.

        Args:
            length: the option that says how long the training is.
        """
        if len(self.losses) < 2 or kept not in self.losses or last not in self.losses:
            return None
        first = self.losses.get(0, math.nan) if self.first is None else self.first
        before, loss, end = map(self.measure.shown, (first, self.losses[kept], self.losses[last]))
        lowest, steps = self.measure.lowest(self.losses), f"step {self.before + kept} of {self.before + last}"
        name, best, better = f"validation {self.measure.name}", self.measure.best, self.measure.better
        further = "lower" if self.measure is LOSS else "raise"
        if self.keeps and lowest not in (0, kept):  # of a part that was trained with --keep last
            return (f"the weights are those of {steps}, with a {name} of {loss}; it was {better} "
                    f"{self._when(lowest)} ({self.measure.shown(self.losses[lowest])}), and those were not kept")
        if kept != last and not kept:
            return (f"the adapter stays the one that was there before these {last} steps: its {name} is "
                    f"{loss}, and {end} at the end")
        if kept != last:
            return (f"the weights are those of {steps}, whose {name} was {best}: {loss}, and "
                    f"{end} at the end; fewer {length}, a lower --learning-rate or more rows may {further} it further")
        if lowest == last and self.measure.level(first) != self.measure.level(self.losses[last]):
            return (f"the {name} was {best} at the end, {loss} instead of {before}: more {length} may {further} it "
                    "further, and --continue goes on from here")
        return None
