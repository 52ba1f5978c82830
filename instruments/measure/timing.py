"""Wall-clock seconds of a call."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that `call` takes."""
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def fastest_seconds(call: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` calls."""
    return min(seconds_of(call) for _ in range(repeats))
