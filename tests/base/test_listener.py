"""What is said in another thread, kept until there is room for it."""

from __future__ import annotations

from gemma_tune.base.listener import Held, Listener


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(f"note {text}")

    def warn(self, text: str) -> None:
        self.said.append(f"warning {text}")


def test_what_is_said_waits_until_it_is_told_in_its_order_and_once():
    heard = Heard()
    held = Held(heard)
    held.note("one")
    held.warn("two")
    assert held.waits and heard.said == []
    held.tell()
    assert heard.said == ["note one", "warning two"] and not held.waits
    held.note("three")
    assert held.waits, "it is kept again"
    held.tell()
    assert heard.said[2:] == ["note three"]


def test_when_it_is_let_go_it_is_told_at_once():
    heard = Heard()
    held = Held(heard)
    held.note("one")
    held.let_go()
    held.warn("two")
    held.tell()
    held.note("three")
    assert heard.said == ["note one", "warning two", "note three"] and not held.waits
