"""A checkpoint's chat template -> token ids, with control tokens that only the template can write.

The rendered text is split at control tokens, so whatever a user, a tool or the model itself wrote must
not contain one. Before rendering, the first character of every control token's name (`<` and `[`) is
replaced in all of their strings by a private-use character that occurs nowhere in the input or the
template; afterwards, when only plain text is left between control tokens, it is put back.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.errors import RequestError, TokenizerError
from moebox.runtime.text.messages import Message, Tool, normalise_messages, normalise_tools
from moebox.runtime.text.tokenizer import CONFIG_FILE, Tokenizer, read_tokenizer_config
from moebox.runtime.text.tool_declarations import UnsupportedSchema, typescript_declarations

if TYPE_CHECKING:
    import jinja2

logger = logging.getLogger("moebox")

TEMPLATE_FILE = "chat_template.jinja"

FALLBACK = """
{%- if tools -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- if messages[0].role != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- set kind = message.role if message.role in ('user', 'assistant') else 'system' -%}
<|im_{{ kind }}|>{{ message.name or message.role }}<|im_middle|>
{%- if message.role == 'tool' %}## Return of {{ message.tool_call_id }}
{% endif -%}
{{ message.content }}
{%- if message.tool_calls -%}
<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments }}<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""
"""Kimi-K2-Instruct's turns, for a checkpoint that lost its template."""

_PRIVATE_USE = (0xF0000, 0x10FFFD)
_NOT_PRIVATE_USE = re.compile(r"[^\x00-\x7f\U000f0000-\U0010fffd]")


@dataclass(frozen=True)
class Part:
    """A stretch of a rendered prompt: a control token, or plain text."""

    text: str
    special: int | None


class Template:
    """A chat template bound to a tokenizer.

    Args:
        source: Jinja text, as transformers reads it.
        tokenizer: gives the control tokens and encodes the text between them.
        name: file the text came from, for messages.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = TEMPLATE_FILE) -> None:
        self.source = source
        self.name = name
        self.tokenizer = tokenizer
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._leads = "".join(sorted({special[0] for special in names}))
        # The lookahead keeps the search from trying 256 names at every character.
        lookahead = f"(?=[{re.escape(self._leads)}])"
        self._specials = re.compile(lookahead + "(?:" + "|".join(map(re.escape, names)) + ")")
        self._compiled, variables = _compile(source, name)
        self.has_thinking = "thinking" in variables
        """Whether the template reads the `thinking` switch."""
        self._wants_typescript = "tools_ts_str" in variables

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Template:
        """The folder's `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, else Kimi's.

        Raises:
            TokenizerError: the template is no valid Jinja; names the file and the line.
        """
        path = folder / TEMPLATE_FILE
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), tokenizer, str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise TokenizerError(f"{path}: cannot be read: {error}") from None
        source = _template_of_config(folder / CONFIG_FILE)
        if source is not None:
            return cls(source, tokenizer, f"{folder / CONFIG_FILE} (chat_template)")
        logger.warning("%s: no chat template: using the one built in for Kimi-K2-Instruct", folder)
        return cls(FALLBACK, tokenizer, "built-in template")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        generated: Mapping[str, list[int]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: OpenAI chat messages; system, user, assistant (with tool calls) and tool.
            tools: OpenAI function declarations.
            thinking: the template's switch of that name; without effect where it has none.
            add_generation_prompt: end with the opening of the assistant's turn.
            generated: text -> the ids that the model produced for it. A model's tokens are not always
                those that `encode` would choose; with its own ids the cached prefix stays valid.

        Raises:
            RequestError: messages or tools that cannot be rendered.
            TokenizerError: the template fails or does what the sandbox forbids.
        """
        known = generated or {}
        tokens: list[int] = []
        for part in self._parts(messages, tools, thinking, add_generation_prompt):
            if part.special is not None:
                tokens.append(part.special)
            else:
                tokens += known.get(part.text) or self.tokenizer.encode(part.text)
        return tokens

    def render_text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as text, for reading: it no longer tells typed names from control tokens."""
        return "".join(part.text for part in self._parts(messages, tools, thinking, add_generation_prompt))

    def _parts(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, thinking: bool, prompt: bool
    ) -> Iterator[Part]:
        variables = self._variables(normalise_messages(messages), normalise_tools(tools))
        guard = _Guard(self._leads, [self.source, *_strings(variables)])
        variables = guard.protect(variables) | {"thinking": thinking, "add_generation_prompt": prompt}
        text = _render(self._compiled, variables, self.name)
        begin = 0
        for match in self._specials.finditer(text):
            if match.start() > begin:
                yield Part(guard.restore(text[begin : match.start()]), None)
            yield Part(match[0], self.tokenizer.specials[match[0]])
            begin = match.end()
        if begin < len(text):
            yield Part(guard.restore(text[begin:]), None)

    def _variables(self, messages: list[Message], tools: list[Tool]) -> dict[str, Any]:
        variables: dict[str, Any] = {"messages": messages, "tools": tools or None}
        if tools and self._wants_typescript:
            try:
                variables["tools_ts_str"] = typescript_declarations(tools)
            except UnsupportedSchema as error:
                logger.warning("tools are declared as JSON, which costs accuracy: %s", error)
        return variables


class _Guard:
    """Swaps the characters that control tokens start with for characters that occur nowhere else."""

    def __init__(self, leads: str, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        free = (chr(code) for code in range(*_PRIVATE_USE) if chr(code) not in used)
        stand_ins = dict(zip(leads, free, strict=False))
        self._protect = str.maketrans(stand_ins)
        self._restore = str.maketrans({stand_in: lead for lead, stand_in in stand_ins.items()})

    def protect(self, value: Any) -> Any:
        """`value` with every string in it, keys included, made harmless."""
        if isinstance(value, str):
            return value.translate(self._protect)
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """The original characters of rendered text."""
        return text.translate(self._restore)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _template_of_config(path: Path) -> str | None:
    value = read_tokenizer_config(path).get("chat_template")
    if isinstance(value, list):  # transformers' older form: several named templates
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{path}: chat_template is a {type(value).__name__}, not a string")
    return value


def _compile(source: str, name: str) -> tuple[jinja2.Template, set[str]]:
    """The template and the variables it reads.

    Compiled in jinja2's sandbox, with the settings and helpers that transformers gives templates.
    """
    import jinja2
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source), meta.find_undeclared_variables(environment.parse(source))
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"{name}:{error.lineno}: no valid chat template: {error.message}") from None


# What an expression in a template can raise: a missing key, a sum of a string and a number, x / 0, ...
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class _Refused(Exception):
    """Raised by a template through `raise_exception`."""


def _render(template: jinja2.Template, variables: dict[str, Any], name: str) -> str:
    import jinja2
    from jinja2.exceptions import SecurityError

    try:
        return template.render(variables)
    except _Refused as error:
        raise RequestError(f"{name}: the chat template refuses these messages: {error}") from None
    except SecurityError as error:
        raise TokenizerError(f"{name}: the chat template is not safe to run: {error}") from None
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
    ) as error:
        kind = type(error).__name__
        raise TokenizerError(f"{name}: the chat template fails: {kind}: {error}") from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    # Private-use characters stay: they stand in for what is put back after rendering.
    return _NOT_PRIVATE_USE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
