"""Texts that end an answer, found across the pieces that it is streamed in."""

from __future__ import annotations

from collections.abc import Iterable


def partial_suffix(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, shorter than `mark`."""
    return next(
        (size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0
    )


class StopStrings:
    """Ends a text at the first of several strings; holds back what could become one.

    Args:
        stops: the strings; none of them is part of the text.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that no stop string can reach; sets `stopped` at one."""
        if not self._stops:
            return text
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if found:  # the one complete first, whatever the pieces it came in
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max(partial_suffix(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back when the text ended otherwise."""
        held, self._held = self._held, ""
        return held
