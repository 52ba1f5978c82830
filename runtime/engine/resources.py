"""What a loaded model holds open, closed once and in a fixed order."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

Close = Callable[[], object]


class Resources:
    """Owns everything that loading opens: recordings of the routing, and other resources.

    `close` closes the recordings first, since saving them reads where the experts lie, and then the other
    resources. Both are closed in reverse order, so that reads of experts end before the store is closed. An
    error of one resource is raised when all resources are closed.

    Four events close:

    - `close`, as often as it is called: each resource is closed once.
    - An exception in the body of `with resources:`, for a load that fails half-way. A body that succeeds
      leaves all of them open.
    - The end of the program.
    - The garbage collection of the object given to `close_with`, which closes all but the recordings: it may
      come in the middle of any operation, and saving runs too much Python for that. The end of the program
      saves them.
    """

    def __init__(self) -> None:
        self._recordings, self._others = ExitStack(), ExitStack()
        atexit.register(self.close)

    def add(self, close: Close) -> None:
        """Own what `close` closes."""
        self._others.callback(close)

    def add_recording(self, close: Close) -> None:
        """Own a recording that `close` saves."""
        self._recordings.callback(close)

    def close_with(self, owner: object) -> None:
        """Close all but the recordings when `owner` is garbage-collected."""
        weakref.finalize(owner, self._others.close).atexit = False  # `close` runs then, in its order

    def close(self) -> None:
        """Close everything that is still open."""
        atexit.unregister(self.close)
        with self._others:
            self._recordings.close()

    def __enter__(self) -> Resources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close()
