"""What the harness takes for a fault. Its long form is ``make faults``."""

from __future__ import annotations

import pytest

from faults.lab import Outcome, contents


@pytest.mark.parametrize(("code", "err", "fault"), [
    (0, "", None), (2, "Error: no such file\nHint: check the path", None),
    (2, "the weights have unexpected keys: model.x", None), (1, "Error: the disk is full", "ended with 1: Error: the disk"),
    (-9, "", "ended with -9"), (None, "", "hangs"), (2, "Traceback (most recent call last):\nKeyError: 3", "KeyError: 3"),
    (2, "Error: unexpected KeyError: 'r'\nHint: repeat with --debug", "unexpected KeyError: 'r'")])
def test_what_a_fault_is(code, err, fault):
    found = Outcome(("merge",), code, "", err, 1.0).fault(0, 2)
    assert found is None if fault is None else fault in found


def test_artifacts_are_compared_and_records_are_not(trained_once):
    names = contents(trained_once).keys()
    assert {"data/train.jsonl", "data/tokens/train.arrow", "tiny-gemma_lora_adapter/adapter_model.safetensors"} <= names
    assert "manifest.json" not in names and not [name for name in names if name.startswith("training_checkpoints")]
