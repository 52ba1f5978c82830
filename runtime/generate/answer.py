"""An answer as it is streamed: tokens -> parser -> stop strings -> pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from moebox.errors import RequestError
from moebox.runtime.generate.loop import Generation
from moebox.runtime.text.pieces import Piece, Stats, ToolCall
from moebox.runtime.text.stop_strings import StopStrings
from moebox.runtime.text.tokenizer import Tokenizer


class Parser(Protocol):
    """Makes pieces of tokens."""

    def push(self, token: int) -> list[Piece]:
        """The pieces that `token` completes."""
        ...

    def finish(self) -> list[Piece]:
        """The pieces that the parser held back, after the last token."""
        ...


class PlainParser:
    """Takes every token as text, for completions without a chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream()

    def push(self, token: int) -> list[Piece]:
        """The text that `token` completes: none inside a character."""
        return _text(self._decoder.push(token))

    def finish(self) -> list[Piece]:
        """The text of an incomplete character at the end."""
        return _text(self._decoder.finish())


class AnswerPieces:
    """The pieces of one answer, without its figures; iterate once.

    Sets `finish_reason` of `generation` where a stop string or a tool call ended the answer.

    Args:
        generation: the tokens.
        parser: makes pieces of them.
        stops: the answer ends before the first of these strings in its text.
    """

    def __init__(self, generation: Generation, parser: Parser, stops: Iterable[str]) -> None:
        self._generation = generation
        self._parser = parser
        self._stops = StopStrings(stops)
        self._called_tools = False

    def __iter__(self) -> Iterator[Piece]:
        for token in self._generation:
            yield from self._before_stop(self._parser.push(token))
            if self._stops.stopped:
                self._generation.finish_reason = "stop"
                return
        yield from self._before_stop(self._parser.finish())
        yield from _text(self._stops.finish())
        if self._called_tools and self._generation.finish_reason == "stop":
            self._generation.finish_reason = "tool_calls"

    def _before_stop(self, pieces: list[Piece]) -> Iterator[Piece]:
        """`pieces` up to a stop string in their text."""
        for piece in pieces:
            if piece.kind != "text":
                yield from _text(self._stops.finish())
                self._called_tools |= piece.kind == "tool_call"
                yield piece
                continue
            yield from _text(self._stops.push(piece.text), piece.warning)
            if self._stops.stopped:
                return


@dataclass
class ReceivedAnswer:
    """What the pieces of one answer have added up to so far."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    final: Stats | None = None

    def add(self, piece: Piece) -> None:
        """Add the next piece."""
        if piece.kind == "text":
            self.text += piece.text
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
        if piece.tool_call is not None:
            self.tool_calls.append(piece.tool_call)
        if piece.warning:
            self.warnings.append(piece.warning)
        self.final = piece.stats or self.final

    @property
    def stats(self) -> Stats:
        """The figures, which the last piece brings."""
        if self.final is None:
            raise RequestError("the answer ended without statistics")
        return self.final


def _text(text: str, warning: str | None = None) -> list[Piece]:
    return [Piece("text", text, warning=warning)] if text else []
