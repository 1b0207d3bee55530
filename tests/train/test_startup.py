"""Where the time before the first step goes."""

from __future__ import annotations

from gemma_tune.train.startup import Startup


def test_parts_are_not_longer_than_all_of_them():
    startup = Startup()
    startup.seconds = {"libraries": 1.42, "plan": 0.31, "weights": 0.18, "adapter": 0.12}
    assert startup.described() == ("ready for the first step after 2.0 s: libraries 1.4 s, plan 0.3 s, weights 0.2 s, "
                                   "adapter 0.1 s")
    startup.seconds["weights"] = 600.0
    assert "after 10 min: " in startup.described() and "weights 10 min, adapter 0.1 s" in startup.described()
