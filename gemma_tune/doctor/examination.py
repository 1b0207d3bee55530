"""``doctor``: every check in order, each a real attempt; what a model needs counts as broken, all else is told."""

from __future__ import annotations

import os
from collections.abc import Iterator

from gemma_tune.base.listener import Listener
from gemma_tune.base.words import model_name
from gemma_tune.doctor import around, compute, libraries, model
from gemma_tune.doctor.finding import BROKEN, LOOK, Finding, tried
from gemma_tune.encoding.tokenizer import quiet_libraries
from gemma_tune.models.quantised import quantisation
from gemma_tune.models.source import BaseModel, locate, split_revision


def examine(model_id: str | None, revision: str | None, listener: Listener) -> Iterator[Finding]:
    """Findings as they are made; a check that cannot be made is a finding as well.

    Of a model at the Hub the configuration and the tokenizer are downloaded, which proves the right to read it, but no
    weights; a GGUF file is made into the checkpoint that a training would make of it.

    Args:
        model_id: what a training would be given as ``--model``; None examines the machine alone.
    """
    yield from libraries.python()
    found = list(tried("libraries", libraries.libraries))
    yield from found
    if any(one.state == BROKEN and one.found.startswith("not installed") for one in found):
        return  # all that follows stands on them
    quiet_libraries()
    yield from tried("network settings", around.network)
    yield from tried("device", compute.devices)
    yield from tried("arithmetic", compute.arithmetic)
    yield from tried("kernels (Triton)", compute.kernels, LOOK)
    yield from _of_model(model_id, revision, listener) if model_id else _of_machine()
    yield from tried("llama.cpp", around.engine, LOOK)
    yield from tried("go", around.go, LOOK)


def _of_machine() -> Iterator[Finding]:
    yield from tried("4 bits (--qlora)", lambda: compute.four_bit(needed=False), LOOK)
    yield from tried("memory", compute.memory)
    yield from tried("places", model.places)
    yield from tried("hub", around.hub, LOOK)
    yield from tried("ollama", lambda: around.ollama(None), LOOK)


def _of_model(model_id: str, revision: str | None, listener: Listener) -> Iterator[Finding]:
    located: list[BaseModel] = []
    yield from tried("model", lambda: located.append(_located(model_id, revision, listener)) or ())
    if not located:
        yield from _of_machine()
        return
    [there] = located
    if there.source == "hub":
        yield from tried("hub", around.hub, LOOK)
    yield from tried("model", lambda: model.had(there))
    yield from tried("4 bits (--qlora)", lambda: compute.four_bit(needed=quantisation(there.config) is not None), LOOK)
    needs: list[model.Needs] = []
    yield from tried("model", lambda: needs.append(model.measured(there)) or ())
    for one in needs:
        yield from tried("memory", lambda one=one: model.fits_memory(one))
        yield from tried("disk", lambda one=one: model.fits_disk(one))
    yield from tried("places", model.places)
    yield from tried("ollama", lambda: around.ollama(there.config["model_type"]), LOOK)


def _located(model_id: str, revision: str | None, listener: Listener) -> BaseModel:
    if not os.path.exists(os.path.expanduser(model_id)):
        model_name(model_id)  # refuses what the stages do, such as a name that is too long to look for
    name, named = split_revision(model_id)
    return locate(name, revision or named, listener, weights=False)
