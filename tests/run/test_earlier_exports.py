"""What is said of files that earlier exports left: a command that makes them again, as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.run.directory import RunDir
from gemma_tune.run.earlier_exports import advice, gone
from gemma_tune.run.manifest import Manifest

RUN = RunDir(Path("runs/m"), "m")
EXPORT = "gemma-tune export-ollama --run runs/m"


@pytest.mark.parametrize(("current", "old", "again"), [
    (["q8_0"], ["q4_0"], f"{EXPORT} --quant q8_0,q4_0"),
    (["q8_0", "250mb"], ["q4_0"], f"{EXPORT} --quant q8_0,q4_0 --size 250mb"),
    (["150mb"], ["250mb"], f"{EXPORT} --size 250mb"),
    (["q8_0"], ["250mb", "350mb"], f"{EXPORT} --quant q8_0 --size 250mb, then {EXPORT} --quant q8_0 --size 350mb"),
])
def test_the_command_makes_what_is_named(current, old, again):
    earlier = {label: {"file": f"m-{label}.gguf", "bytes": 1, "stale": True} for label in old}
    assert f"make {'it' if len(old) == 1 else 'them'} again ({again}), or" in advice(RUN, earlier, current)


def test_of_a_size_that_is_gone_the_command_makes_that_one():
    summary = {"recommended": "250mb", "quants": {"q8_0": {}, "150mb": {}}}
    manifest = Manifest({}, {"export-ollama": {"summary": summary, "inputs": {}, "outputs": {}}})
    assert gone(RUN, manifest) == {"250mb": f"{EXPORT} --quant q8_0 --size 250mb"}
