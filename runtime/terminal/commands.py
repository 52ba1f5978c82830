"""The chat's slash commands: a table of name, usage, help and what to do."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.errors import RequestError
from moebox.runtime.generate.sampling import SamplingOptions
from moebox.runtime.terminal.conversation import Conversation, read_text, read_tools
from moebox.runtime.terminal.cost_text import energy_text, hits_text, price_text

if TYPE_CHECKING:
    from moebox.runtime.terminal.chat import Chat

_COMMAND = re.compile(r"/(?P<name>[A-Za-z]+)(?:\s+(?P<argument>.*))?", re.DOTALL)


class Leave(Exception):
    """The user asked to leave."""


@dataclass(frozen=True)
class Command:
    """A slash command: `run(chat, argument)`."""

    name: str
    usage: str
    help: str
    run: Callable[[Chat, str], None]


def find_command(line: str) -> tuple[Callable[[Chat, str], None], str] | None:
    """The command in `line` and its argument; None where `line` is a message (`//` escapes a slash).

    Raises:
        RequestError: the command does not exist; the error suggests similar ones.
    """
    match = _COMMAND.fullmatch(line.strip())
    if match is None:
        return None
    name = match["name"].lower()
    for command in COMMANDS:
        if command.name == name:
            return command.run, (match["argument"] or "").strip()
    near = difflib.get_close_matches(name, [command.name for command in COMMANDS], n=2)
    hint = f"Did you mean {' or '.join('/' + other for other in near)}? " if near else ""
    raise RequestError(f"no command /{name}", f"{hint}/help lists them; a message may begin with //.")


def _help(chat: Chat, _argument: str) -> None:
    rows = [(f"/{command.name} {command.usage}".strip(), command.help) for command in COMMANDS]
    _table(chat, rows)
    chat.screen.note('"""…""" or Alt-Enter: several lines · Ctrl-C: stop the answer · Ctrl-D: leave')


def _clear(chat: Chat, _argument: str) -> None:
    chat.conversation.messages.clear()
    chat.attached.clear()
    kept = "; the system prompt is kept" if chat.conversation.system else ""
    chat.screen.note(f"new conversation{kept}")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        chat.screen.note(chat.conversation.system or "no system prompt: the template's own, if it has one")
        return
    chat.conversation.system = None if argument == "none" else argument
    chat.screen.note("system prompt removed" if argument == "none" else "system prompt set")


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    if not name:
        rows = [(item.name, str(getattr(chat.sampling, item.name))) for item in fields(chat.sampling)]
        _table(chat, [*rows, ("tools", ", ".join(_tool_names(chat)) or "none")])
    elif name == "tools":
        chat.conversation.tools = (
            [] if value.strip() == "none" else read_tools(_path(value, "/set tools FILE"))
        )
        chat.screen.note(f"tools: {', '.join(_tool_names(chat)) or 'none'}")
    else:
        chat.set_sampling(**{name: _value(name, value.strip())})
        chat.screen.note(f"{name} = {getattr(chat.sampling, name)}")


def _tool_names(chat: Chat) -> list[str]:
    return [tool["function"]["name"] for tool in chat.conversation.tools]


def _value(name: str, text: str) -> Any:
    """`text` as the option's type; `none` is None, `default` the option's default."""
    defaults = {item.name: item.default for item in fields(SamplingOptions)}
    if text in ("none", "default"):
        return defaults.get(name)
    if name == "stop":
        return (text,)
    try:
        return json.loads(text)
    except ValueError:
        return text  # SamplingOptions raises an error that names the option


def _think(chat: Chat, argument: str) -> None:
    if argument in ("show", "hide"):
        chat.screen.show_reasoning = argument == "show"
        chat.screen.note(f"reasoning is {'shown' if argument == 'show' else 'hidden'}")
        return
    if argument not in ("", "on", "off"):
        raise RequestError(f"/think {argument}", "Usage: /think on, off, show or hide.")
    chat.thinking = not chat.thinking if not argument else argument == "on"
    without = "" if chat.model.template.has_thinking else " (this model's template has no such switch)"
    chat.screen.note(f"thinking is {'on' if chat.thinking else 'off'}{without}")


def _regen(chat: Chat, _argument: str) -> None:
    if not chat.conversation.drop_answer():
        raise RequestError("nothing to answer again", "Send a message first.")
    if chat.sampling.temperature == 0 or chat.sampling.seed is not None:
        chat.screen.note("with temperature 0 or a fixed seed the answer stays the same: see /set")
    chat.answer()


def _save(chat: Chat, argument: str) -> None:
    path = _path(argument, "/save FILE")
    chat.conversation.save(path, chat.model.name)
    chat.screen.note(f"saved {len(chat.conversation.messages)} messages to {path}")


def _load(chat: Chat, argument: str) -> None:
    chat.conversation = Conversation.load(_path(argument, "/load FILE"))
    chat.attached.clear()
    chat.screen.note(f"loaded {len(chat.conversation.messages)} messages")


def _read(chat: Chat, argument: str) -> None:
    path = _path(argument, "/read FILE")
    text = read_text(path)
    chat.attach(path.name, text)
    tokens = len(chat.model.tokenizer.encode(text))
    chat.screen.note(f"{path.name} ({tokens:,} tokens) goes with your next message")


def _stats(chat: Chat, _argument: str) -> None:
    totals, last = chat.totals, chat.last
    usage = totals.usage
    prefill = usage.computed_prompt_tokens / usage.prefill_s if usage.prefill_s else 0.0
    decode = totals.decoded_tokens / usage.decode_s if usage.decode_s else 0.0
    used = last.context_used if last else 0
    prices = chat.model.accounts.prices
    cost = totals.cost(prices)
    _table(
        chat,
        [
            ("answers", f"{totals.answers:,}"),
            ("prompt tokens", f"{usage.prompt_tokens:,}, {usage.cached_tokens:,} of them cached"),
            ("answer tokens", f"{usage.completion_tokens:,}"),
            ("prompt speed", f"{prefill:,.1f} tok/s"),
            ("answer speed", f"{decode:,.1f} tok/s"),
            ("last first token", f"{last.ttft_s:.2f} s" if last else "-"),
            ("context", f"{used:,} of {chat.model.session.context:,} tokens"),
            ("energy", energy_text(usage.energy, usage.computed_tokens) or "-"),
            ("cost", price_text(cost, prices.currency) if cost else "-"),
            ("experts", hits_text(usage.traffic) or "-"),
        ],
    )


def _exit(_chat: Chat, _argument: str) -> None:
    raise Leave


def _path(argument: str, usage: str) -> Path:
    if not argument.strip():
        raise RequestError("no file named", f"Usage: {usage}.")
    return Path(argument.strip()).expanduser()


def _table(chat: Chat, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    chat.screen.end_line()
    chat.screen.notes.print(table)


COMMANDS = (
    Command("help", "", "this list", _help),
    Command("clear", "", "forget the conversation, keep the system prompt", _clear),
    Command("system", "[TEXT|none]", "show, set or remove the system prompt", _system),
    Command("set", "[NAME VALUE]", "show or set a sampling option; tools FILE", _set),
    Command("think", "[on|off|show|hide]", "let the model reason first; show its reasoning", _think),
    Command("regen", "", "answer the last message again", _regen),
    Command("save", "FILE", "write the conversation as JSON", _save),
    Command("load", "FILE", "continue a saved conversation", _load),
    Command("read", "FILE", "send a file's text with the next message", _read),
    Command("stats", "", "tokens, speeds, energy and cost of this session", _stats),
    Command("exit", "", "leave, as Ctrl-D does", _exit),
)
