"""A conversation as the chat keeps it: system prompt, messages, tools; on disk as one JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebox.errors import RequestError
from moebox.runtime.text.messages import Message, Tool, normalise_messages, normalise_tools
from moebox.runtime.text.pieces import ToolCall

FORMAT = "moebox-chat"
VERSION = 1


@dataclass
class Conversation:
    """A system prompt, tools and the other messages; `/clear` removes only the messages."""

    system: str | None = None
    tools: list[Tool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    def prompt(self) -> list[Message]:
        """All messages for the model, the system prompt first."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return [*first, *self.messages]

    def add_user(self, text: str) -> None:
        """Append the user's turn."""
        self.messages.append({"role": "user", "content": text})

    def add_answer(
        self, text: str, reasoning: str = "", calls: list[ToolCall] | None = None, interrupted: bool = False
    ) -> None:
        """Append the model's turn; `interrupted` marks one that the user stopped."""
        message: Message = {"role": "assistant", "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [call.to_message() for call in calls]
        if interrupted:
            message["interrupted"] = True
        self.messages.append(message)

    def add_result(self, call: ToolCall, content: str) -> None:
        """Append a tool's result."""
        self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})

    def drop_answer(self) -> bool:
        """Remove everything after the last user turn; False where there is no user turn."""
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if turns:
            del self.messages[turns[-1] + 1 :]
        return bool(turns)

    def save(self, path: Path, model: str) -> None:
        """Write the conversation to `path`, whole or not at all.

        Raises:
            RequestError: the file exists and is no saved chat, or cannot be written.
        """
        if path.exists() and not _is_chat(path):
            raise RequestError(f"{path} exists and is no saved chat", "Choose another name.")
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "system": self.system,
            "tools": self.tools,
            "messages": self.messages,
        }
        text = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RequestError(f"{path}: cannot be written: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote.

        Raises:
            RequestError: names the file and what in it is wrong.
        """
        data = _read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RequestError(f"{path} is no saved chat", "Load a file that /save wrote.")
        if data.get("version") != VERSION:
            raise RequestError(f"{path}: version {data.get('version')!r}; this moebox reads {VERSION}")
        system, messages = data.get("system"), data.get("messages")
        if not isinstance(system, str | None) or not isinstance(messages, list):
            raise RequestError(f"{path}: system or messages are damaged")
        try:
            tools = normalise_tools(data.get("tools"))
            if messages:
                normalise_messages(messages)
        except RequestError as error:
            raise RequestError(f"{path}: {error.what}", error.fix) from None
        return cls(system, tools, messages)


def read_tools(path: Path) -> list[Tool]:
    """Tools of a JSON file: a list of OpenAI function declarations, or an object with one as `tools`.

    Raises:
        RequestError: names the file and the tool.
    """
    data = _read_json(path)
    if isinstance(data, dict):
        data = data.get("tools", [data])
    try:
        return normalise_tools(data)
    except RequestError as error:
        raise RequestError(f"{path}: {error.what}", error.fix) from None


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        RequestError: the file is missing, unreadable or no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{path} is no UTF-8 text") from None
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None


def _is_chat(path: Path) -> bool:
    try:
        data = _read_json(path)
    except RequestError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT
