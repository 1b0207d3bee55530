"""What this process may use of the machine: no heavy import."""

from __future__ import annotations

import os


def cores() -> int:
    """Processors that this process may run on, which can be fewer than there are: in a container, under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
