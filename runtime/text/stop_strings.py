"""Strings that end an answer, found across the pieces of a stream."""

from __future__ import annotations

from collections.abc import Iterable


def partial_suffix(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    return next(
        (size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0
    )


class StopStrings:
    """Ends a streamed text before the first stop string, and holds back text that could become one.

    Args:
        stops: the stop strings.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string, of `text` and what was held back."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:  # the stop string that is complete first, for any division into pieces
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max(partial_suffix(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, at an end without a stop string."""
        held, self._held = self._held, ""
        return held
