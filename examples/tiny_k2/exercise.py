"""Made-up requests: a sentence that names every value, and the call that it asks for.

They practise what dialogues contain rarely: copying unknown names, and writing dates and times in the format
of the tools.
"""

import copy
import json
import random

from augment import MONTHS, Augmenter, _ordinal, _rename
from dialogues import Dialogue

OPENINGS = ("I need", "Please find", "Can you look for", "I want", "Help me with", "I'd like", "Get me", "Do")
JOINTS = (", ", ", ", " and ", ". ", ", also ")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def exercise(augmenter: Augmenter, rng: random.Random) -> Dialogue:
    """One request with its call; sometimes the values come in several turns."""
    tools = copy.deepcopy(rng.sample(augmenter.tools, min(rng.randint(1, 3), len(augmenter.tools))))
    function = tools[0]["function"]
    chosen = _chosen_parameters(function["parameters"], rng)
    arguments, said = {}, []
    for name in chosen:
        value, words = _value(augmenter, name, function["parameters"]["properties"][name], rng)
        arguments[name] = value
        said.append(_mention(name, words, rng))
    description = function["description"]
    opening = f"{rng.choice(OPENINGS)} this: {description.lower()}" if rng.random() < 0.5 else description
    dialogue = {"tools": rng.sample(tools, len(tools)), "messages": _turns(opening, said, rng)}
    call = {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False, sort_keys=True)}
    dialogue["messages"].append(
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": f"functions.{function['name']}:0", "function": call}],
        }
    )
    if rng.random() < 0.5:
        _rename(dialogue, rng)
    return dialogue


def _chosen_parameters(parameters: dict, rng: random.Random) -> list[str]:
    """All required parameters and some of the others, in random order."""
    names = [
        name for name in parameters["properties"] if name in parameters["required"] or rng.random() < 0.3
    ]
    return rng.sample(names, len(names))


def _turns(opening: str, said: list[str], rng: random.Random) -> list[dict]:
    split = rng.randint(0, len(said)) if rng.random() < 0.3 else len(said)
    first = [opening + ". "]
    for part in said[:split]:
        first += [part, rng.choice(JOINTS)]
    text = "".join(first[:-1] if split else first).strip()
    messages = [{"role": "user", "content": text if text.endswith(".") else text + "."}]
    for part in said[split:]:
        messages.append({"role": "assistant", "content": "What else should I know?"})
        messages.append({"role": "user", "content": part[:1].upper() + part[1:] + "."})
    return messages


def _mention(name: str, words: str, rng: random.Random) -> str:
    slot = name.replace("_", " ")
    return rng.choice([f"{slot} {words}", f"the {slot} is {words}", f"{words}", f"{words} as the {slot}"])


def _value(augmenter: Augmenter, name: str, schema: dict, rng: random.Random) -> tuple[str, str]:
    """A value in the tool's format, and the same in the user's words."""
    if "enum" in schema:
        value = rng.choice(schema["enum"])
        return value, _as_word(value, rng)
    known = rng.choice(augmenter.values.get(name) or [""])
    if "date" in name or "day" in name:
        return _date(rng)
    if "time" in name:
        return _time(rng)
    if not known or rng.random() < 0.1:
        number = str(rng.randint(1, 2000) if rng.random() < 0.3 else rng.randint(1, 10))
        return number, _as_word(number, rng)
    value = augmenter._other_name(name, known, rng)
    return value, value.lower() if rng.random() < 0.1 else value


def _as_word(value: str, rng: random.Random) -> str:
    if value in ("True", "False"):
        return {"True": "yes", "False": "no"}[value]
    spoken = value.isdigit() and 0 < int(value) <= 10 and rng.random() < 0.5
    return NUMBERS[int(value) - 1] if spoken else value


def _date(rng: random.Random) -> tuple[str, str]:
    month, day = 3 if rng.random() < 0.5 else rng.randint(1, 12), rng.randint(1, 30)
    if month == 3 and rng.random() < 0.4:
        words = rng.choice(
            [f"the {_ordinal(day)}", f"{_ordinal(day)} of this month", f"the {_ordinal(day)} of March"]
        )
    else:
        name = MONTHS[month - 1]
        words = rng.choice([f"{name} {_ordinal(day)}", f"{name} {day}", f"{_ordinal(day)} of {name}"])
    return f"2019-{month:02}-{day:02}", words


def _time(rng: random.Random) -> tuple[str, str]:
    hour, minute = rng.randint(0, 23), rng.choice([0, 0, 15, 30, 30, 45])
    twelve, half = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm"
    part = "morning" if hour < 12 else "afternoon" if hour < 17 else "evening"
    clock = f"{twelve}:{minute:02}" if minute else f"{twelve}"
    ways = [f"{clock} {half}", f"{clock} in the {part}", f"{part} {clock}"]
    if minute == 30:
        ways.append(f"half past {twelve} in the {part}")
    if minute == 15:
        ways.append(f"quarter past {twelve} in the {part}")
    if minute == 45:
        ways.append(f"quarter to {twelve % 12 + 1} in the {part}")
    return f"{hour:02}:{minute:02}", rng.choice(ways)
