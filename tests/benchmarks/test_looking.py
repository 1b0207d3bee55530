"""The benchmark of looking at pictures once runs, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import looking  # noqa: E402


def test_it_measures_both_ways():
    found = looking.measure(2, small=True)
    assert found["tokens"] > 20 and found["epochs"] == 2
    assert 0 < found["step"] < found["step_with_looking"] and found["always"] >= found["step_with_looking"]
