"""The log-probabilities that a preference training compares with: of the model as it is before its first step.

They are computed once, with the model that is trained anyway, and kept in the run, so no second model is ever in
memory and a repeated or resumed training does not compute them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemma_tune.base.files import os_errors, write_atomic
from gemma_tune.base.versions import library_versions
from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.units import Units

_TASK = "log-probabilities of the reference"


def look_up(trainer: Any, session: Session, key: Mapping[str, Any]) -> None:
    """Fill ``reference`` of the training's and the validation's units, from the run's file or by computing them.

    The adapter in the model is as it is before the first step.

    Args:
        trainer: the :class:`gemma_tune.train.preference.PreferenceTrainer`.
        key: what they depend on, see :func:`key_of`.
    """
    sides = {"train": trainer.train_dataset, **({"valid": trainer.eval_dataset} if trainer.eval_dataset else {})}
    path = session.run.reference
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    found = _read(path, digest, sides) if processes.is_main() else None
    found = processes.gathered(found)[0]
    if found is None:
        found = _computed(trainer, sides)
        if processes.is_main():
            with os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, save(found, metadata={"key": digest}))
        session.listener.note("the reference is the model before its first step; its log-probabilities are kept")
    else:
        session.listener.note("log-probabilities of the reference: as kept")
    for name, units in sides.items():
        units.reference = found[name]
        if units.mismatched:
            units.mismatch_reference = found[f"{name}_mismatched"]


def key_of(session: Session, content: Sequence[str], start: str | None, compute: str) -> dict[str, Any]:
    """What the reference's log-probabilities depend on.

    Args:
        content: fingerprints of the base model, and of the tokens of training and validation.
        start: digest of the adapter that the training starts from; None where that is zero.
        compute: device and type.
    """
    config = session.config
    return {"content": list(content), "start": start, "compute": compute, "qlora": config.qlora,
            "mismatched": config.method == "kto",
            "libraries": {name: library_versions()[name] for name in ("torch", "transformers")}}


def _computed(trainer: Any, sides: Mapping[str, Units]) -> dict[str, np.ndarray]:
    """Each process computes a part of the sequences."""
    here, found = processes.place(), {}
    asked = [(name, units, False) for name, units in sides.items()]
    asked += [(f"{name}_mismatched", units, True) for name, units in sides.items() if units.mismatched]
    total, done = sum(len(units) for _, units, _ in asked), 0
    trainer.refresh()
    with trainer.evaluating():
        for name, units, mismatched in asked:
            mine = np.argsort(-units.lengths, kind="stable")[here.rank::here.count].tolist()
            values: dict[int, list[float]] = {}
            for numbers in _parts(mine, len(units), trainer):
                rows = [[unit["mismatch"]] if mismatched else unit["sequences"] for unit in units.__getitems__(numbers)]
                logps, _ = trainer.preference.log_probabilities(trainer.model, [row for own in rows for row in own])
                per = iter(logps.tolist())
                values |= {number: [next(per) for _ in own] for number, own in zip(numbers, rows)}
                done += len(numbers) * here.count
                trainer.listener.progress(_TASK, min(done, total - 1), total)
            together = {n: v for share in processes.gathered(values) for n, v in share.items()}
            found[name] = np.array([x for n in range(len(units)) for x in together[n]], np.float32)
    trainer.listener.progress(_TASK, total, total)
    return found


def _parts(mine: Sequence[int], units: int, trainer: Any) -> Iterator[Sequence[int]]:
    """As many units at once as in training; with parts of the model in each process, all make as many passes."""
    size, most = max(1, trainer.micro_batch), -(-units // processes.place().count)
    for start in range(0, most if trainer.sharded else len(mine), size):
        yield mine[start:start + size]


def _read(path: Any, digest: str, sides: Mapping[str, Units]) -> dict[str, np.ndarray] | None:
    """What the file holds, if it was made of the same; else None."""
    try:
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("key") != digest:
                return None
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    for name, units in sides.items():
        wanted = {name: len(units.sizes), **({f"{name}_mismatched": len(units)} if units.mismatched else {})}
        if any(found.get(key, np.zeros(0)).shape != (size,) for key, size in wanted.items()):
            return None
    return found if all(np.isfinite(values).all() for values in found.values()) else None
