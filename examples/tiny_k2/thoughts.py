"""Short thoughts for the turns of a dialogue, made by rule: which tool, what is known, what is missing."""

import json
import random
import re
from typing import Any

from dialogues import Dialogue

SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are tiny-k2, a small assistant that calls tools.")


def thinking_cut(dialogue: Dialogue, rng: random.Random) -> Dialogue:
    """The dialogue up to a random answer, with a thought for every assistant message."""
    messages = dialogue["messages"]
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    calls = [n for n in turns if messages[n].get("tool_calls")]
    last = rng.choice(calls if calls and rng.random() < 0.5 else turns)
    if messages[last].get("tool_calls") and rng.random() < 0.5 and last + 2 < len(messages):
        last += 2  # the call, its result and the answer to it
    cut = [dict(message) for message in messages[: last + 1]]
    for n, message in enumerate(cut):
        if message["role"] == "assistant":
            message["reasoning_content"] = thought(messages, n)
    return {**dialogue, "messages": cut}


def thought(messages: list[dict[str, Any]], turn: int) -> str:
    """What stands between `<think>` and `</think>` before message `turn`."""
    before = messages[turn - 1]
    if messages[turn].get("tool_calls"):
        function = messages[turn]["tool_calls"][0]["function"]
        return f"I call {function['name']} with {', '.join(json.loads(function['arguments']))}."
    if before["role"] == "tool":
        found = len(json.loads(before["content"]))
        return f"{before['name']} returned {found} result{'s' * (found != 1)}. I tell the user."
    following = next((m for m in messages[turn:] if m.get("tool_calls")), None)
    if following is None:
        return "No tool is needed. I answer."
    said = " ".join(message["content"] for message in messages[:turn]).lower()
    function = following["tool_calls"][0]["function"]
    arguments = json.loads(function["arguments"])
    missing = [key for key, value in arguments.items() if not _is_said(value, said)]
    if missing:
        return f"{function['name']} is next. Missing: {', '.join(missing)}. I ask."
    return f"{function['name']} is next. Nothing is missing. I confirm."


def _is_said(value: str, said: str) -> bool:
    """Whether a value stands in the text: word for word, or as the day of a date or hour of a time."""
    if date := re.fullmatch(r"\d{4}-\d\d-(\d\d)", value):
        return bool(re.search(rf"\b{int(date[1])}(st|nd|rd|th)?\b", said))
    if time := re.fullmatch(r"(\d\d?):\d\d", value):
        return bool(re.search(rf"\b({int(time[1])}|{(int(time[1]) - 1) % 12 + 1})\b", said))
    return value.lower() in said


def without_tools(dialogue: Dialogue) -> Dialogue:
    """The start of a dialogue, up to the request before its first tool call, without declared tools."""
    messages = dialogue["messages"]
    first = next((n for n, m in enumerate(messages) if m.get("tool_calls")), len(messages))
    return {"tools": [], "messages": messages[: first - 1]} if first > 2 else dialogue


def with_system_prompt(dialogue: Dialogue, rng: random.Random) -> Dialogue:
    """The dialogue under one of a few system prompts."""
    system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
    return {**dialogue, "messages": [system, *dialogue["messages"]]}
