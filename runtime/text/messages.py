"""Checks messages and tools in the OpenAI chat format, and converts them to Kimi's form.

Kimi's ids of tool calls are `functions.{name}:{idx}`, where idx counts over the whole conversation. Ids of
another form in the history, such as `call_abc`, make the model's answers worse, so they are replaced here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebox.errors import RequestError

Message = dict[str, Any]
Tool = dict[str, Any]

_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
_NATIVE_ID = re.compile(r"functions\.(?P<name>.+):(?P<index>\d+)")
_TEXT_KEYS = ("name", "reasoning_content", "reasoning")


def tool_call_id(name: str, index: int) -> str:
    """Kimi's id of the conversation's tool call number `index` (from 0)."""
    return f"functions.{name}:{index}"


def tool_call_index(call_id: str) -> int | None:
    """The number in an id of Kimi's form; None for another form."""
    match = _NATIVE_ID.fullmatch(call_id)
    return int(match["index"]) if match else None


def next_tool_call_index(messages: Iterable[Message]) -> int:
    """The number of the next tool call of a normalised conversation."""
    indices = [
        tool_call_index(call["id"]) for message in messages for call in message.get("tool_calls") or ()
    ]
    return max((index + 1 for index in indices if index is not None), default=0)


def normalise_tools(tools: Sequence[Tool] | None) -> list[Tool]:
    """Tools in the form `{"type": "function", "function": {...}}`, with keys sorted at every depth.

    Raises:
        RequestError: a tool without a valid name, or parameters that are no JSON Schema object.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise RequestError(f"tools is a {type(tools).__name__}", "Give a list of function declarations.")
    checked = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    sorted_tools: list[Tool] = _deep_sorted(checked)
    return sorted_tools


def _tool(tool: object, where: str) -> Tool:
    if isinstance(tool, dict) and "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict):
        raise RequestError(f"{where} has no function", 'A tool is {"type": "function", "function": {...}}.')
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise RequestError(f"{where}: name {name!r}", "Letters, digits, `_`, `-` and `.`, 128 at most.")
    if not isinstance(function.get("parameters", {}), dict | None):
        raise RequestError(f"{where}: parameters of {name!r} are no JSON Schema object")
    return {"type": "function"} | tool


def _deep_sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _deep_sorted(value[key]) for key in sorted(value)}
    return [_deep_sorted(item) for item in value] if isinstance(value, list) else value


def normalise_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with text content, Kimi's tool-call ids, and only the keys that templates read.

    Raises:
        RequestError: a message is not of the format; names the message and the fault.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("messages is empty", 'Give at least {"role": "user", "content": "..."}.')
    calls = _Calls()
    return [_message(message, f"messages[{index}]", calls) for index, message in enumerate(messages)]


@dataclass
class _Calls:
    """The conversation's tool calls so far.

    Attributes:
        ids: given id -> (Kimi's id, name).
        unanswered: given ids without a result yet, in order.
        next_index: number of the next call whose given id has none.
    """

    ids: dict[str, tuple[str, str]] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    next_index: int = 0

    def add(self, given: str | None, name: str) -> str:
        """Note a call; returns Kimi's id of it."""
        match = _NATIVE_ID.fullmatch(given or "")
        index = int(match["index"]) if match and match["name"] == name else None
        known = {native for native, _ in self.ids.values()}
        if index is None or tool_call_id(name, index) in known:
            index = self.next_index
        self.next_index = max(self.next_index, index + 1)
        native = tool_call_id(name, index)
        self.ids[given or native] = (native, name)
        self.unanswered.append(given or native)
        return native

    def answer(self, given: object, where: str) -> tuple[str, str]:
        """Kimi's id and the name of the call that a result answers; without an id the oldest open call."""
        key = self.unanswered[0] if given is None and self.unanswered else given
        if not isinstance(key, str) or key not in self.ids:
            raise RequestError(
                f"{where}: tool_call_id {given!r} answers no tool call before it",
                "Put the assistant message with that tool call before its result.",
            )
        if key in self.unanswered:
            self.unanswered.remove(key)
        return self.ids[key]


def _message(message: object, where: str, calls: _Calls) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where} is a {type(message).__name__}, not an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}: role {role!r}", "One of system, user, assistant, tool.")
    clean: Message = {"role": role, "content": content_text(message.get("content"), where)}
    for key in _TEXT_KEYS:
        if message.get(key) is not None:
            clean[key] = _string(message[key], f"{where}: {key}")
    if message.get("tool_calls"):
        clean["tool_calls"] = _tool_calls(message["tool_calls"], where, calls)
    if role == "tool":
        clean["tool_call_id"], name = calls.answer(message.get("tool_call_id"), where)
        clean.setdefault("name", name)
    return clean


def content_text(content: object, where: str) -> str:
    """Text of a message's content: a string, None, or a list of text parts.

    Raises:
        RequestError: another kind of content, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{where}: content[{index}]") for index, part in enumerate(content))
    return _string(content, f"{where}: content")


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise RequestError(
            f"{where} is of type {kind!r}", "moebox runs the text model: send text parts only."
        )
    return _string(part.get("text"), f"{where}: text")


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} is a {type(value).__name__}, not a string")
    return value


def _tool_calls(given: object, where: str, calls: _Calls) -> list[Message]:
    if not isinstance(given, list):
        raise RequestError(f"{where}: tool_calls is a {type(given).__name__}, not a list")
    return [_tool_call(call, f"{where}: tool_calls[{index}]", calls) for index, call in enumerate(given)]


def _tool_call(call: object, where: str, calls: _Calls) -> Message:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(f"{where} has no function")
    name = _string(function.get("name"), f"{where}: function.name")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    given = call.get("id")
    native = calls.add(None if given is None else _string(given, f"{where}: id"), name)
    return {"id": native, "type": "function", "function": {"name": name, "arguments": arguments}}
