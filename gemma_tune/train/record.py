"""``train.yaml``: what a training was told and what it chose itself, as a settings file that trains the same again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.base.files import fresh_path, os_errors, write_atomic
from gemma_tune.base.versions import library_versions
from gemma_tune.base.words import counted
from gemma_tune.config.settings import in_words, same_result
from gemma_tune.config.settings_file import ORIGINS, settings_file
from gemma_tune.config.stages import AUTO, TrainConfig
from gemma_tune.models.placement import Placement
from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.memory import BatchChoice

_MADE_HERE = ("torch", "transformers", "trl", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class SettingsRecord:
    """A training's settings, as far as they are known when its first step begins; of several processes the main one
    writes them.

    Args:
        went_on: whether it goes on from a finished training (``--continue``).
    """

    session: Session
    placement: Placement
    choice: BatchChoice
    went_on: bool = False

    def begin(self) -> None:
        """Say those that are no defaults, and write them where no finished training has its own there."""
        if not processes.is_main():
            return
        values, sources = self._resolved(self.choice.micro_batch, self.session.config.compile)
        earlier = "train" in self.session.manifest.stages
        if not earlier:
            self._write(self.session.run.train_settings, values, sources)
        usual = TrainConfig().as_dict() | {"target_modules": "all"}
        told = [f"{in_words({name: value})} ({sources[name].split(':')[0]})" for name, value in values.items()
                if value != usual[name] and name not in same_result(TrainConfig)]
        self.session.listener.note(f"settings: {', '.join(told) or 'all are defaults'}; every one of them "
                                   f"{'will be' if earlier else 'is'} in {self.session.run.train_settings}")

    def end(self, trainer: Any) -> None:
        """Write them beside their place, which they take with the adapter: with what the training had to take on its
        way, when memory ran out, or compiling did not help."""
        if processes.is_main():
            settings = self._resolved(trainer.micro_batch, trainer.compiled)
            self._write(fresh_path(self.session.run.train_settings), *settings)

    def _resolved(self, micro_batch: int, compiled: bool) -> tuple[dict[str, Any], dict[str, str]]:
        """Every setting's value, and what is said of it. What stays None follows the device and changes no result."""
        config = self.session.config
        values = config.as_dict()
        fitted = self.choice.reason if micro_batch == self.choice.micro_batch else "memory ran out with more"
        chosen = {"dtype": (self.placement.short, self.placement.reason),
                  "micro_batch": (micro_batch, fitted),
                  "activation_checkpointing": (self.choice.checkpointing, self.choice.reason),
                  "compile": (compiled, "compiled layers did not serve here")}
        sources = {name: ORIGINS.get(origin, origin) for name, origin in self.session.resolved.origins.items()}
        for name, (value, reason) in chosen.items():
            if values[name] != value:
                given = values[name] not in (None, AUTO)
                sources[name] = f"{ORIGINS[AUTO]}: {f'{values[name]} was asked for, ' if given else ''}{reason}"
                values[name] = value
        if not values["target_modules"]:
            values["target_modules"] = "all"
        return values, sources

    def _write(self, path: Path, values: dict[str, Any], sources: dict[str, str]) -> None:
        with os_errors(path):
            write_atomic(path, settings_file("train", values, sources, self._about()).encode())

    def _about(self) -> list[str]:
        model = self.session.model
        outputs = self.session.manifest.stages["prepare"]["outputs"]
        installed = library_versions()
        again = ["Every setting of this training, with where its value came from. The same adapter again, on a CPU bit "
                 "for", "bit, from the same data and base model, with these versions and as many threads:"]
        if self.went_on:
            again = ["Every setting of this training, with where its value came from. It went on from a finished one, "
                     "whose", "learning rates were those of a shorter schedule: in one go another adapter comes of "
                     "them, unless the", "schedule is constant:"]
        return [
            *again,
            "  gemma-tune train --force --config PATH-OF-THIS-FILE",
            f"base model: {model.id}{f' at {model.revision}' if model.revision else ''}",
            f"tokens: sha256 {outputs['tokens']['sha256']}",
            f"computed on {self.placement.device} with {_threads()}",
            ", ".join([f"gemma-tune {__version__}",
                       *(f"{name} {installed[name]}" for name in _MADE_HERE if name in installed)])]


def _threads() -> str:
    import torch

    return counted(torch.get_num_threads(), "thread")
