"""Messages -> token ids, through a checkpoint's chat template; only the template can write control tokens.

The rendered text is split at the names of control tokens, so text of a user, a tool or the model must not
contain such a name. Before rendering, the characters with which the names begin (`<` and `[`) are replaced in
all of these strings by private-use characters that occur in no input and not in the template. After the
split, the original characters are put back into the plain text.
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
"""Kimi-K2-Instruct's form of a conversation, for a checkpoint without a template."""

_PRIVATE_USE = (0xF0000, 0x10FFFD)
_NOT_PRIVATE_USE = re.compile(r"[^\x00-\x7f\U000f0000-\U0010fffd]")


@dataclass(frozen=True)
class Part:
    """A part of a rendered prompt: plain text, or the control token with the id `special`."""

    text: str
    special: int | None


class Template:
    """A chat template bound to a tokenizer.

    Args:
        source: Jinja text, as transformers reads it.
        tokenizer: has the control tokens, and encodes the text between them.
        name: the file that has the text, for error messages.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = TEMPLATE_FILE) -> None:
        self.source = source
        self.name = name
        self.tokenizer = tokenizer
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._leads = "".join(sorted({special[0] for special in names}))
        # Without the lookahead, a search would try 256 names at every character.
        lookahead = f"(?=[{re.escape(self._leads)}])"
        self._specials = re.compile(lookahead + "(?:" + "|".join(map(re.escape, names)) + ")")
        self._compiled, variables = _compile(source, name)
        self.has_thinking = "thinking" in variables
        """Whether the template reads the `thinking` switch."""
        self._wants_typescript = "tools_ts_str" in variables

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Template:
        """`chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, else `FALLBACK`.

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
            thinking: the template's variable of that name; without effect where the template does not read
                it.
            add_generation_prompt: end with the opening of the assistant's turn.
            generated: text -> the ids that the model generated for it. A model's tokens are not always those
                of `encode`; with the model's ids, the cached prefix of a conversation stays valid.

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
        """The prompt as text to read, in which a control token and its typed name look the same."""
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
    """Replaces the characters with which control tokens begin by characters that occur in no text.

    Args:
        leads: the characters to replace.
        texts: all texts that will be rendered.
    """

    def __init__(self, leads: str, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        free = (chr(code) for code in range(*_PRIVATE_USE) if chr(code) not in used)
        stand_ins = dict(zip(leads, free, strict=False))
        self._protect = str.maketrans(stand_ins)
        self._restore = str.maketrans({stand_in: lead for lead, stand_in in stand_ins.items()})

    def protect(self, value: Any) -> Any:
        """`value` with the characters replaced in all of its strings, keys included."""
        if isinstance(value, str):
            return value.translate(self._protect)
        if isinstance(value, dict):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, list) else value

    def restore(self, text: str) -> str:
        """`text` with the original characters."""
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
    """Compile a template in jinja2's sandbox, with the settings and helpers of transformers.

    Returns:
        The template, and the names of the variables that it reads.
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


# Errors of expressions in a template: a missing key, a sum of a string and a number, a division by 0.
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
    except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
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
    # Private-use characters stay as they are, because `_Guard.restore` replaces them after rendering.
    return _NOT_PRIVATE_USE.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
