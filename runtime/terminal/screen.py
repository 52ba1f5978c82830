"""Where an answer is shown: text and tool calls on stdout, all else on stderr."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict

from moebox.errors import MoeboxError
from moebox.runtime.terminal.console import ending, footer, harmless, open_console
from moebox.runtime.terminal.cost_text import cost_line
from moebox.runtime.text.pieces import Piece, Stats, ToolCall

_PROGRESS_AFTER_S = 0.5


class Screen:
    """Streams one answer after another.

    Control characters of the model's text are made visible on a terminal; a pipe gets the text as it is.

    Args:
        show_reasoning: print reasoning, dimmed.
        calls_as_json: print each tool call as a line of JSON, for programs, instead of a line for reading.
    """

    def __init__(self, show_reasoning: bool = True, calls_as_json: bool = False) -> None:
        self.show_reasoning = show_reasoning
        self._calls_as_json = calls_as_json
        self.notes = open_console(sys.stderr)
        self._answers = open_console(sys.stdout)
        self._to_terminal = sys.stdout.isatty()
        self._notes_to_terminal = sys.stderr.isatty()
        self._clean = harmless if self._to_terminal else str
        self._open: str | None = None  # "text" or "reasoning": the kind of the line that has not ended
        self._progress_begin: float | None = None
        self._progress_shown = False

    def show(self, piece: Piece) -> None:
        """The next piece of an answer; its figures are for `end`."""
        if piece.kind == "text":
            self._text(piece.text)
        elif piece.kind == "reasoning":
            self._reasoning(piece.text)
        elif piece.tool_call is not None:
            self._tool_call(piece.tool_call)

    def _text(self, text: str) -> None:
        self._switch("text")
        sys.stdout.write(self._clean(text))
        sys.stdout.flush()
        self._open = None if text.endswith("\n") else "text"

    def _reasoning(self, text: str) -> None:
        if self.show_reasoning:
            self._switch("reasoning")
            self.notes.out(harmless(text), style="dim", end="")
            self._open = None if text.endswith("\n") else "reasoning"

    def _tool_call(self, call: ToolCall) -> None:
        self.end_line()
        if self._calls_as_json:
            self._text(json.dumps({"tool_call": asdict(call)}, ensure_ascii=False) + "\n")
        else:
            self._answers.out(self._clean(f"tool call {call.name} {call.arguments}"), style="bold")

    def end_line(self) -> None:
        """End the line that has not ended, if there is one."""
        self._clear_progress()
        if self._open == "text":
            sys.stdout.write("\n")
            sys.stdout.flush()
        elif self._open == "reasoning":
            self.notes.out("")
        self._open = None

    def note(self, text: str) -> None:
        """A dim line beside the answer."""
        self.end_line()
        self.notes.out(harmless(text), style="dim")

    def error(self, error: MoeboxError) -> None:
        """An error and its fix; the chat goes on."""
        self.end_line()
        self.notes.out(harmless(f"error: {error.what}"), style="red")
        if error.fix:
            self.notes.out(harmless(error.fix))

    def end(self, stats: Stats) -> None:
        """The end of an answer: the limit that ended it, if one did, and on a terminal the footer."""
        self.end_line()
        reason = ending(stats)
        if reason:
            self.note(reason)
        if self._notes_to_terminal:
            self.note(footer(stats))
            if line := cost_line(stats.usage, stats.cost, stats.currency):
                self.note(line)

    def prefill(self, done: int, total: int) -> None:
        """Progress through a long prompt: one line that disappears, on a terminal only."""
        now = time.monotonic()
        if self._progress_begin is None or done == 0:
            self._progress_begin = now
        if self._notes_to_terminal and done < total and now - self._progress_begin > _PROGRESS_AFTER_S:
            sys.stderr.write(f"\r\x1b[2Kreading the prompt: {done:,}/{total:,} tokens")
            sys.stderr.flush()
            self._progress_shown = True

    def _switch(self, kind: str) -> None:
        """Text after reasoning, or the other way round, begins on a new line of the terminal."""
        self._clear_progress()
        if self._open not in (None, kind) and self._to_terminal and self._notes_to_terminal:
            self.end_line()

    def _clear_progress(self) -> None:
        if self._progress_shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._progress_shown = False
