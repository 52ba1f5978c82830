"""Splits a model's output, token by token, into reasoning, text and tool calls.

    <think> reasoning </think> text
    <|tool_calls_section_begin|>
      <|tool_call_begin|> functions.{name}:{idx} <|tool_call_argument_begin|> {json} <|tool_call_end|> ...
    <|tool_calls_section_end|>

Tags are control tokens only; text that spells a tag stays text. Output that does not parse is passed on as
text with a warning. Only white space between calls is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import Literal

from moebox.runtime.text.messages import tool_call_id, tool_call_index
from moebox.runtime.text.pieces import Piece, PieceKind, ToolCall
from moebox.runtime.text.stop_strings import partial_suffix
from moebox.runtime.text.tokenizer import Tokenizer

THINK_BEGIN, THINK_END = "<think>", "</think>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"

_NAME = re.compile(r"[\w.\-]+")


class _State(Enum):
    TEXT = auto()
    REASONING = auto()
    SECTION = auto()
    """In a tool-call section, between calls."""
    CALL_ID = auto()
    ARGUMENTS = auto()


_SPEAKING = (_State.TEXT, _State.REASONING)
_CALLING = (_State.CALL_ID, _State.ARGUMENTS)


class OutputParser:
    """Turns generated tokens into pieces.

    Args:
        tokenizer: names the control tokens.
        thinking_open: the prompt ended inside the think block, so the output begins with reasoning.
        think_as_text: the think tags are no control tokens of this model, as in some members of the family,
            so a think block at the start of the output is found in the text.
        next_index: number, in the conversation, of the next call whose id has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking_open: bool = False,
        think_as_text: bool = False,
        next_index: int = 0,
    ) -> None:
        tags = (THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)
        self._tags = {tokenizer.specials[tag]: tag for tag in tags if tag in tokenizer.specials}
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._think_text = ThinkText(thinking_open) if think_as_text else None
        self._state = _State.REASONING if thinking_open and not think_as_text else _State.TEXT
        self._in_section = False
        self._next_index = next_index
        self._call_id = ""
        self._arguments = ""
        self._raw = ""  # the output since the last complete piece: passed on as text if it does not parse

    def push(self, token: int) -> list[Piece]:
        """Pieces that `token` completes."""
        if token not in self._tokenizer.special_names:
            return list(self._text(self._decoder.push(token)))
        pieces = list(self._text(self._decoder.finish()))
        tag = self._tags.get(token)
        if tag is None:
            return pieces + list(self._text(self._tokenizer.special_names[token]))
        if self._think_text is not None:
            pieces += self._think_text.leave()
        return pieces + list(self._tag(tag))

    def finish(self) -> list[Piece]:
        """Pieces that were held back; a call that was cut short becomes text."""
        pieces = list(self._text(self._decoder.finish()))
        if self._think_text is not None:
            pieces += self._think_text.leave()
        pieces += self._end_call("the output ends inside it")
        return pieces + list(self._flush("text in a tool-call section"))

    def _text(self, text: str) -> Iterator[Piece]:
        if not text:
            return
        if self._state in _SPEAKING:
            yield from self._speak(text)
            return
        self._raw += text
        if self._state is _State.CALL_ID:
            self._call_id += text
        elif self._state is _State.ARGUMENTS:
            self._arguments += text

    def _speak(self, text: str, warning: str | None = None) -> Iterator[Piece]:
        if self._think_text is not None:
            yield from self._think_text.push(text)
        else:
            kind: PieceKind = "text" if self._state is _State.TEXT else "reasoning"
            yield Piece(kind, text, warning=warning)

    def _tag(self, tag: str) -> Iterator[Piece]:
        if tag == THINK_BEGIN and self._state is _State.TEXT:
            self._state = _State.REASONING
        elif tag == THINK_END and self._state is _State.REASONING:
            self._state = _State.TEXT
        elif tag == SECTION_BEGIN and not self._in_section:
            yield from self._end_call("a section begins inside it")
            self._enter(_State.SECTION, tag)
            self._in_section = True
        elif tag == SECTION_END and self._in_section:
            yield from self._end_section()
        elif tag == CALL_BEGIN:
            yield from self._end_call("the next one begins inside it")
            yield from self._flush("text between tool calls")
            self._enter(_State.CALL_ID, tag)
            self._call_id = self._arguments = ""
        elif tag == ARGUMENT_BEGIN and self._state is _State.CALL_ID:
            self._enter(_State.ARGUMENTS, tag)
        elif tag == CALL_END and self._state in _CALLING:
            self._raw += tag
            yield from self._complete_call()
        else:
            yield from self._stray(tag)

    def _enter(self, state: _State, tag: str) -> None:
        self._state = state
        self._raw += tag

    def _stray(self, tag: str) -> Iterator[Piece]:
        if self._state in _SPEAKING:
            yield from self._speak(tag, warning=f"{tag} out of place")
        else:
            yield from self._text(tag)

    def _complete_call(self) -> Iterator[Piece]:
        """The call that ends here, or its text where it has no arguments or its id names no tool."""
        given, arguments = self._call_id.strip(), self._arguments
        name = tool_name(given)
        has_arguments = self._state is _State.ARGUMENTS
        self._state = _State.SECTION if self._in_section else _State.TEXT
        if name is None or not has_arguments:
            fault = f"no tool name in its id {given!r}" if name is None else "it has no arguments"
            yield from self._flush(f"not a tool call: {fault}")
            return
        self._raw = ""
        index = tool_call_index(given)
        if index is None:
            index = self._next_index
        self._next_index = max(self._next_index, index + 1)
        call = ToolCall(tool_call_id(name, index), name, arguments)
        yield Piece("tool_call", tool_call=call, warning=_json_fault(arguments))

    def _end_call(self, fault: str) -> Iterator[Piece]:
        """End a call that lacks its end tag: with complete arguments it is a call, else text."""
        if self._state is _State.ARGUMENTS and _json_fault(self._arguments) is None:
            yield from self._complete_call()
        elif self._state in _CALLING:
            self._state = _State.SECTION if self._in_section else _State.TEXT
            yield from self._flush(f"not a tool call: {fault}")

    def _end_section(self) -> Iterator[Piece]:
        yield from self._end_call("the section ends inside it")
        self._raw += SECTION_END
        yield from self._flush("text in a tool-call section")
        self._state = _State.TEXT
        self._in_section = False

    def _flush(self, warning: str) -> Iterator[Piece]:
        """Pass on as text what did not parse, unless it is nothing but section tags and white space."""
        raw, self._raw = self._raw, ""
        if raw.replace(SECTION_BEGIN, "").replace(SECTION_END, "").strip():
            yield Piece("text", raw, warning=warning)


class ThinkText:
    """Finds `<think>...</think>` at the start of the output where the tags are ordinary text.

    A tag may arrive in parts, so text that could become a tag is held back.
    """

    def __init__(self, is_open: bool) -> None:
        self._phase: Literal["start", "reasoning", "text"] = "reasoning" if is_open else "start"
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """Pieces of the text that was held back and of `text`."""
        self._held += text
        pieces: list[Piece] = []
        if self._phase == "start":
            self._look_for_begin()
        if self._phase == "reasoning":
            pieces += self._reasoning()
        if self._phase == "text":
            pieces += self.leave()
        return pieces

    def _look_for_begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(THINK_BEGIN):
            self._phase, self._held = "reasoning", text.removeprefix(THINK_BEGIN)
        elif not THINK_BEGIN.startswith(text):
            self._phase = "text"

    def _reasoning(self) -> list[Piece]:
        before, tag, after = self._held.partition(THINK_END)
        if tag:
            self._phase, self._held = "text", after
        else:
            cut = len(before) - partial_suffix(before, THINK_END)
            before, self._held = before[:cut], before[cut:]
        return [Piece("reasoning", before)] if before else []

    def leave(self) -> list[Piece]:
        """The text that was held back, at the output's end or a control token."""
        held, self._held = self._held, ""
        kind: PieceKind = "reasoning" if self._phase == "reasoning" else "text"
        self._phase = "text"
        return [Piece(kind, held)] if held else []


def tool_name(call_id: str) -> str | None:
    """The tool's name in a call's id: the part between the first `.` and the last `:`, both optional."""
    name = call_id.rpartition(":")[0] if ":" in call_id else call_id
    name = name.partition(".")[2] if "." in name else name
    return name if _NAME.fullmatch(name) else None


def _json_fault(arguments: str) -> str | None:
    """The fault of a call's arguments; None where they are a JSON object."""
    try:
        value = json.loads(arguments)
    except ValueError as error:
        return f"the arguments are no JSON: {error}"
    return None if isinstance(value, dict) else "the arguments are no JSON object"
