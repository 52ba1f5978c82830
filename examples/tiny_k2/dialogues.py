"""Dialogues -> the model's own chat template -> token ids with a loss weight each.

A dialogue is `{"tools": [...], "messages": [...]}` in OpenAI's chat format. Sequences are rendered by
`chat_template.jinja` itself, so what the model learns is what a runtime will send.
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import tiktoken

Dialogue = dict[str, Any]

DECLARATIONS, USER, RESULTS, ANSWER, CALL, NOTHING = range(6)
LOSS_WEIGHTS = (0.03, 0.1, 0.2, 1.0, 2.0, 0.0)
"""By kind of token: what the model has to write counts most, and of that the tool calls."""


def read_dialogues(path: Path) -> list[Dialogue]:
    """All dialogues of a `.jsonl.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def tojson(value: Any, sort_keys: bool = False) -> str:
    """transformers' `tojson` filter, as far as the template needs it."""
    return json.dumps(value, ensure_ascii=False, sort_keys=sort_keys)


def load_template(folder: Path) -> jinja2.Template:
    """The folder's `chat_template.jinja`, compiled with transformers' settings."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = tojson
    return environment.from_string((folder / "chat_template.jinja").read_text())


@dataclass
class Renderer:
    """Template and tokenizer of one model folder."""

    template: jinja2.Template
    encoding: tiktoken.Encoding

    def encode(self, dialogue: Dialogue, think: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (uint16) and kinds (uint8, index into LOSS_WEIGHTS).

        With `think` the last assistant messages carry `reasoning_content`; the very last one is written
        out as the model would write it, since a template blanks the thoughts of finished answers.
        """
        messages, tools = dialogue["messages"], dialogue["tools"]
        text = self.template.render(messages=messages, tools=tools)
        last = messages[-1]
        if think and not last.get("tool_calls"):
            prompt = {"messages": messages[:-1], "tools": tools, "add_generation_prompt": True}
            text = self.template.render(**prompt, thinking=True)
            text += f"<think>{last['reasoning_content']}</think>{last['content']}<|im_end|>"
        ids = self.encoding.encode(text, allowed_special="all")
        return np.array(ids, np.uint16), self._kinds(ids, declared=bool(tools))

    def _kinds(self, ids: list[int], declared: bool) -> np.ndarray:
        """What each token is a part of, read off the marks around turns and calls."""
        token = self.encoding.encode_single_token
        roles = {
            token("<|im_user|>"): USER,
            token("<|im_assistant|>"): ANSWER,
            token("<|im_system|>"): RESULTS,
        }
        middle, call = token("<|im_middle|>"), token("<|tool_calls_section_begin|>")
        stops = {token("<|im_end|>"): NOTHING, token("<|tool_calls_section_end|>"): ANSWER}
        kinds = np.full(len(ids), NOTHING, np.uint8)
        role = kind = NOTHING
        for n, number in enumerate(ids):
            if number in roles:
                role = DECLARATIONS if declared and n == 0 else roles[number]
            kind = CALL if number == call else kind
            kinds[n] = kind
            kind = role if number == middle else stops.get(number, kind)
        return _without_empty_thoughts(np.array(ids), kinds, token("<think>"), token("</think>"))


def _without_empty_thoughts(ids: np.ndarray, kinds: np.ndarray, opening: int, closing: int) -> np.ndarray:
    """`<think></think>` is part of the prompt, so the model must not learn to write it."""
    empty = np.flatnonzero((ids[:-1] == opening) & (ids[1:] == closing))
    kinds[empty] = kinds[empty + 1] = NOTHING
    return kinds
