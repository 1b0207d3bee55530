"""A bound on time: it interrupts, leaves others' alarms alone, and does nothing where it cannot."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from gemma_tune.base.at_most import TookTooLong, at_most

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarms")


def test_what_takes_too_long_is_interrupted_and_nothing_else():
    began = time.monotonic()
    with pytest.raises(TookTooLong), at_most(0.05):
        try:
            time.sleep(20)
        except Exception:  # noqa: BLE001 - what is interrupted often catches everything
            pytest.fail("it was caught")
    assert time.monotonic() - began < 10
    with at_most(30):
        pass


def test_somebody_elses_alarm_and_handler_come_back():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    timer = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with at_most(5):
            pass
        time.sleep(0.4)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_in_another_thread_nothing_is_interrupted():
    done = []

    def work():
        with at_most(0.01):
            time.sleep(0.05)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
