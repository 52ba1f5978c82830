"""The session that a model keeps between answers, and the lock that lets one answer at a time use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from moebox.errors import BusyError
from moebox.runtime.generate.loop import TokenSession


class SessionMaker(Protocol):
    """What is needed of `Engine`."""

    def session(self) -> TokenSession:
        """A session with an empty cache."""
        ...


class KeptSession:
    """A session whose cache is kept from answer to answer; one answer at a time uses it.

    An answer that is refused changes nothing.

    Args:
        engine: makes the session.
    """

    def __init__(self, engine: SessionMaker) -> None:
        self._engine = engine
        self._session: TokenSession | None = None
        self._opening = Lock()
        self._busy = Lock()

    def get(self) -> TokenSession:
        """The session; it is opened on first use."""
        with self._opening:
            if self._session is None:
                self._session = self._engine.session()
            return self._session

    @contextmanager
    def use(self, *, afresh: bool = False) -> Iterator[TokenSession]:
        """The session, for one answer.

        Args:
            afresh: begin with an empty cache.

        Raises:
            BusyError: another answer uses it.
        """
        if not self._busy.acquire(blocking=False):
            raise BusyError("the model is busy with another answer", "Read that one to its end, or close it.")
        try:
            if afresh:
                self._session = None  # before another is opened: memory may not hold two
            yield self.get()
        finally:
            self._busy.release()
