"""One model: can it be had, does it fit the memory and the disk, under which licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.base.cache import cache_dir
from gemma_tune.base.words import gigabytes, size_text
from gemma_tune.config.stages import TrainConfig
from gemma_tune.doctor.finding import BROKEN, LOOK, OK, Finding
from gemma_tune.hub.access import request_for
from gemma_tune.models.licence import base_licence
from gemma_tune.models.placement import USABLE, available, choose_placement
from gemma_tune.models.quantised import quantisation, refuse_untrainable
from gemma_tune.models.source import BaseModel
from gemma_tune.run.directory import RUNS
from gemma_tune.train.memory import choose
from gemma_tune.train.shape import shape_of

if TYPE_CHECKING:
    from gemma_tune.train.memory import BatchChoice
    from gemma_tune.train.shape import ModelShape

LENGTHS = (2048, 1024, 512, 256)  # tokens of the longest row; the first is the limit of `prepare`
# What a run keeps besides the model: the merged one in 16 bits, and one GGUF in the default format, of 8.5 bits.
_GGUF_SHARE = 8.5 / 16
_CHECKPOINTS = 4  # copies of adapter and optimiser: two checkpoints, the best adapter, the last one


@dataclass(frozen=True)
class Needs:
    """A model that was found, and its sizes."""

    model: BaseModel
    shape: ModelShape

    @property
    def weights(self) -> int:
        """Bytes in 16 bits."""
        return 2 * self.shape.parameters


def measured(model: BaseModel) -> Needs:
    """Sizes of a model with the default adapter, from its configuration.

    Raises:
        UserError: it cannot be trained.
    """
    refuse_untrainable(model.id, model.config)
    placement = choose_placement("auto")
    return Needs(model, shape_of(model.path, TrainConfig(), placement.dtype, device=placement.device))


def had(model: BaseModel) -> Iterator[Finding]:
    """That a model could be had, and its licence."""
    there = any(model.path.glob("*.safetensors"))
    where = {"hub": f"commit {(model.revision or '')[:12]}", "local": f"in {model.path}"}.get(model.source, "made of a "
                                                                                            "GGUF file")
    later = "" if there else "; its weights are downloaded by the first command that needs them"
    yield Finding("model", OK, f"{model.id}: {where}, {model.config['model_type']}{later}")
    licence = base_licence(model)
    name = licence.get("license_name") or licence.get("license")
    if name:
        link = f", {licence['license_link']}" if licence.get("license_link") else ""
        asked = model.source == "hub" and not model.from_cache
        accepted = ", and this account may read it" if asked else ""
        yield Finding("licence", OK, f"{name}{link}{accepted}")
    else:
        yield Finding("licence", LOOK, "the model's files state none", "look at the page that it comes from")


def fits_memory(needs: Needs) -> Iterator[Finding]:
    """Whether a training with default settings fits, and up to which length of rows; else whether 4 bits help."""
    placement = choose_placement("auto")
    room = available(placement.device)
    config = replace(TrainConfig(), qlora=quantisation(needs.model.config) is not None)

    def tried(length: int) -> BatchChoice:
        choice = choose(needs.shape, config, length, placement.device, room)
        if choice.fits or placement.instead is None:
            return choice
        return choose(replace(needs.shape, narrow=True), config, length, placement.device, room)

    fitting = [(length, choice) for length in LENGTHS if (choice := tried(length)).fits]
    where = f"of {gigabytes(room)} available on {placement.device}"
    if fitting:
        length, choice = fitting[0]
        how = f"{choice.micro_batch} x {length:,} tokens at once" + (", recomputed" if choice.checkpointing else "")
        found = f"training takes about {gigabytes(choice.memory.total)} {where}, with {how}"
        if length == LENGTHS[0]:
            yield Finding("memory", OK, found)
        else:
            yield Finding("memory", LOOK, f"{found}; longer rows do not fit",
                          f"gemma-tune prepare --max-length {length}, or close other programs")
        return
    least = tried(LENGTHS[-1]).memory.total
    packed = choose(needs.shape, replace(config, qlora=True), LENGTHS[-1], placement.device, room)
    found = f"training takes at least {gigabytes(least)} {where}, of which {USABLE:.0%} may be used"
    if packed.fits and placement.device != "mps":
        yield Finding("memory", LOOK, f"{found}; with the base in 4 bits {gigabytes(packed.memory.total)}",
                      f"gemma-tune train --qlora, and gemma-tune prepare --max-length {LENGTHS[-1]}")
    else:
        yield Finding("memory", BROKEN, found, "take a smaller model, such as --model google/gemma-3-270m-it; or more "
                                               "memory, and close other programs")


def fits_disk(needs: Needs) -> Iterator[Finding]:
    """Room for the download, and for what a run keeps, on the disks where they go."""
    wanted: dict[Path, int] = {}
    model = needs.model
    if model.source == "hub" and not any(model.path.glob("*.safetensors")):
        wanted[_existing(request_for(model.id, None).cache)] = needs.weights
    run = _existing(RUNS.absolute())
    adapter = 16 * needs.shape.adapter  # fp32, with the two moments of AdamW and once more for the whole
    wanted[run] = wanted.get(run, 0) + round(needs.weights * (1 + _GGUF_SHARE)) + _CHECKPOINTS * adapter
    disks: dict[int, tuple[list[Path], int]] = {}
    for place, size in wanted.items():
        places, total = disks.get(os.stat(place).st_dev, ([], 0))
        disks[os.stat(place).st_dev] = ([*places, place], total + size)
    for places, size in disks.values():
        free = shutil.disk_usage(places[0]).free
        found = (f"about {size_text(size)} for {'the download and ' if len(wanted) == 2 and len(disks) == 1 else ''}"
                 f"a run (merged model, one GGUF, checkpoints), {size_text(free)} free in {places[-1]}")
        if len(disks) == 2:
            found = f"about {size_text(size)} of {size_text(free)} free in {places[0]}"
        yield Finding("disk", OK if size < free else BROKEN, found, "" if size < free else
                      "free some space (`hf cache rm` removes old models), name another disk with --run DIR, or set "
                      "HF_HOME for downloads")


def places() -> Iterator[Finding]:
    """That the caches and the directory of the runs can be written."""
    for what, place, mend in (("runs", RUNS.absolute(), "name another place with --run DIR"),
                              ("cache", cache_dir(), "set GEMMA_TUNE_CACHE to a directory that can be written")):
        there = _existing(place)
        if not os.access(there, os.W_OK):
            yield Finding(what, BROKEN if what == "runs" else LOOK, f"{there} cannot be written", mend)


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())
