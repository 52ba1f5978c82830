"""Input of the chat: a terminal with line editing, or lines of a pipe."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moebox.folders import state_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

logger = logging.getLogger("moebox")

QUOTES = '"""'


class Reader(Protocol):
    """Asks the user for text."""

    def ask(self, label: str, text: str = "", remember: bool = True) -> str:
        """Ask for one message.

        Args:
            label: stands before the input.
            text: the input to begin with, which the user may edit.
            remember: keep the message in the history.

        Raises:
            EOFError: there is no more input (Ctrl-D).
            KeyboardInterrupt: Ctrl-C on an empty line.
        """
        ...


def open_reader(commands: Iterable[str], history: Path | None = None) -> Reader:
    """The terminal where stdin and stderr are one, else plain lines of stdin."""
    if sys.stdin.isatty() and sys.stderr.isatty():
        return TerminalReader(commands, history or state_folder() / "chat_history")
    return LineReader()


def unquoted(text: str) -> str:
    '''`text` without the `"""` around a message of several lines.'''
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def quote_is_open(text: str) -> bool:
    '''Whether `text` begins with `"""` and lacks the closing one.'''
    stripped = text.strip()
    return stripped.startswith(QUOTES) and (len(stripped) < 6 or not stripped.endswith(QUOTES))


class LineReader:
    '''Messages from a pipe: one a line, or several lines between `"""`.'''

    def ask(self, label: str, text: str = "", remember: bool = True) -> str:
        """Read one message; `label` is shown only where stdin is a terminal."""
        if sys.stdin.isatty():
            sys.stderr.write(label)
            sys.stderr.flush()
        line = self._line()
        while quote_is_open(line):
            try:
                line += "\n" + self._line()
            except EOFError:
                break
        return unquoted(line)

    def _line(self) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class TerminalReader:
    """Line editing through prompt_toolkit, with a history that is kept in a file.

    Enter sends, except inside an open `\"\"\"`; Alt-Enter begins a new line; pasted lines stay together.
    """

    def __init__(self, commands: Iterable[str], history: Path) -> None:
        self._sessions: dict[bool, PromptSession[str]] = {
            True: _session(history, list(commands)),
            False: _session(None, []),
        }

    def ask(self, label: str, text: str = "", remember: bool = True) -> str:
        """Let the user edit one message; it joins the history where `remember` is set."""
        return unquoted(self._sessions[remember].prompt(label, default=text))


def _session(history: Path | None, commands: list[str]) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.output import ColorDepth, create_output

    kept = FileHistory(str(history)) if history and _writable(history) else InMemoryHistory()
    return PromptSession(
        history=kept,
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
        multiline=True,
        prompt_continuation="... ",
        key_bindings=_keys(),
        output=create_output(stdout=sys.stderr),
        color_depth=ColorDepth.MONOCHROME if os.environ.get("NO_COLOR") else None,
        enable_open_in_editor=False,
    )


def _writable(history: Path) -> bool:
    """Create the history file for its owner alone; a warning and False where that fails."""
    try:
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(history, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError as error:
        logger.warning("%s: %s: the history of this chat is not kept", history, error.strerror)
        return False
    return True


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if quote_is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
