"""Endless variations of the training dialogues, so that a model has to copy values and cannot memorize them.

Names, titles, addresses and numbers are replaced by others throughout a dialogue, dates are moved, functions
and parameters renamed, tools shuffled, added and dropped. A value that the user names in other words (`SF`,
`the first of the month`) is kept: only values that the text contains are replaced.
"""

import copy
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

from dialogues import Dialogue

NO_NAME = re.compile(r"True|False|dontcare|[\d\W]*|\d{4}-\d\d-\d\d|\d\d?:\d\d")
NUMBER = re.compile(r"\d[\d.-]*\d")
DATE = re.compile(r"2019-03-(\d\d)")
RELATIVE = re.compile(
    r"\b(to(day|morrow|night)|day after|this (morning|after|even|coming|mon|tues|wed|thurs|fri|sat|sun)\w*"
    r"|week|weekend|now|(mon|tues|wednes|thurs|fri|satur|sun)day)\b",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")
MONTHS = WORD.findall("January February March April May June July August September October November December")
SYLLABLES = WORD.findall("""
    ba be bi bo bra bre cal can car cha che cor da del den do dor el en fa fer fin flo ga gar gil go gra hal
    har hel hol in ja jo ka kel kin la lan len li lo lu ma mar mel min mo mon na nel ni no o or pa pel pi po
    ra ren ri ro ru sa san sel shi so sta ta tam tel ti to tor tra u va ven vi wal wen wil ya yo za zu
""")
ENDINGS = WORD.findall("n s r t l d ck ston ville ford ham ton er ia ski man land berg wood ez ley x m th")

SYNONYMS = {
    "city": "town place location area", "location": "place city spot area", "place": "location spot site",
    "area": "district region city", "date": "day", "time": "hour clock", "name": "title label",
    "title": "name", "type": "kind category class", "category": "type kind genre", "genre": "category kind",
    "number": "count amount total", "seats": "places tickets people", "rooms": "units bedrooms",
    "origin": "start departure source", "destination": "target arrival goal", "from": "origin start",
    "to": "target destination", "pickup": "collection start", "dropoff": "return end", "departure": "leaving",
    "return": "back homeward", "price": "cost fee", "fare": "price cost", "artist": "singer musician",
    "song": "track tune", "movie": "film picture", "hotel": "inn lodging", "restaurant": "eatery diner",
    "event": "show happening", "check": "arrive", "in": "in", "star": "quality", "rating": "score",
    "travelers": "passengers people", "passengers": "travelers riders", "airlines": "carrier airline",
    "account": "wallet", "recipient": "payee receiver", "transfer": "payment", "amount": "sum value",
    "address": "street", "phone": "telephone contact", "theater": "cinema", "property": "home residence",
    "visit": "viewing", "doctor": "physician", "dentist": "doctor", "stylist": "salon hairdresser",
    "appointment": "booking meeting", "ride": "trip lift", "shared": "pooled joint", "album": "record",
    "year": "released", "device": "player", "wifi": "internet", "pets": "animals", "director": "filmmaker",
    "Find": "Search Lookup Get List Discover", "Search": "Find Lookup Get Query", "Get": "Fetch Find Show",
    "Reserve": "Book Order Hold", "Buy": "Purchase Order Book", "Book": "Reserve Schedule Make",
    "Play": "Start Stream", "Lookup": "Find Search", "Schedule": "Book Arrange", "Check": "Show Get",
    "Transfer": "Send Move", "Add": "Create New", "Rent": "Hire", "Restaurants": "Eateries Diners",
    "Movies": "Films", "Events": "Shows Happenings", "Weather": "Forecast", "Ride": "Taxi Cab",
    "Hotel": "Lodging Inn", "Car": "Vehicle", "Cars": "Vehicles", "Bus": "Coach", "Song": "Track Music",
    "Media": "Film Video", "Tickets": "Seats", "Ticket": "Seat", "Apartment": "Flat Home",
    "Provider": "Professional Expert", "Appointment": "Meeting Visit", "Attractions": "Sights Places",
}  # fmt: skip


class Augmenter:
    """Makes variations of dialogues; values and tools are drawn from all `dialogues`."""

    def __init__(self, dialogues: list[Dialogue]) -> None:
        by_slot: defaultdict[str, set[str]] = defaultdict(set)
        for dialogue in dialogues:
            for slot, value in _values(dialogue):
                if not NO_NAME.fullmatch(value):
                    by_slot[slot].add(value)
        self.values = {slot: sorted(values) for slot, values in by_slot.items()}
        self.words = sorted({word for values in by_slot.values() for value in values for word in value.split()
                             if word[-1] not in ",;:"})  # fmt: skip
        tools = {tool["function"]["name"]: tool for dialogue in dialogues for tool in dialogue["tools"]}
        self.tools = list(tools.values())

    def vary(self, dialogue: Dialogue, rng: random.Random) -> Dialogue:
        """One variation; `dialogue` stays as it is."""
        dialogue = copy.deepcopy(dialogue)
        if rng.random() < 0.15:
            return dialogue
        if rng.random() < 0.85:
            self._swap_values(dialogue, rng)
        if rng.random() < 0.4:
            _move_dates(dialogue, rng)
        self._change_tools(dialogue, rng)
        if rng.random() < 0.5:
            _rename(dialogue, rng)
        return dialogue

    def _swap_values(self, dialogue: Dialogue, rng: random.Random) -> None:
        allowed = {value for tool in dialogue["tools"] for value in _enum_values(tool)}
        fixed = allowed | _unsaid(dialogue)
        swaps: dict[str, str] = {}
        for slot, value in _values(dialogue):
            if value in swaps or value in fixed:
                continue
            if not NO_NAME.fullmatch(value):
                swaps[value] = self._other_name(slot, value, rng)
            elif NUMBER.fullmatch(value) and not DATE.fullmatch(value):
                swaps[value] = _other_number(value, rng)
        _replace(dialogue, swaps)

    def _other_name(self, slot: str, value: str, rng: random.Random) -> str:
        """A value of the same slot, words of other values, or words that do not exist."""
        if rng.random() < 0.35:
            return rng.choice(self.values.get(slot) or self.words)
        words = value.split()
        if rng.random() < 0.2:
            words = words[: rng.randint(1, 4)] + ["x"] * rng.randint(0, 1)
        return " ".join(self._other_word(word, rng) for word in words)

    def _other_word(self, word: str, rng: random.Random) -> str:
        if word.isdigit():
            return _other_number(word, rng)
        if rng.random() < 0.5:
            return rng.choice(self.words)
        made = "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) + rng.choice([*ENDINGS, ""])
        return made.capitalize()

    def _change_tools(self, dialogue: Dialogue, rng: random.Random) -> None:
        tools = dialogue["tools"]
        used = {call["function"]["name"] for call in _calls(dialogue)}
        if rng.random() < 0.2:
            tools = [tool for tool in tools if tool["function"]["name"] in used] or tools
        if rng.random() < 0.25:
            names = {tool["function"]["name"] for tool in tools}
            others = rng.sample(self.tools, min(rng.randint(1, 2), len(self.tools)))
            tools = tools + [tool for tool in others if tool["function"]["name"] not in names]
        dialogue["tools"] = rng.sample(tools, len(tools))


def _calls(dialogue: Dialogue) -> Iterator[dict]:
    for message in dialogue["messages"]:
        yield from message.get("tool_calls", ())


def _values(dialogue: Dialogue) -> Iterator[tuple[str, str]]:
    """(slot, value) of every argument and every field of a result."""
    for call in _calls(dialogue):
        yield from json.loads(call["function"]["arguments"]).items()
    for message in dialogue["messages"]:
        if message["role"] == "tool":
            for result in json.loads(message["content"]):
                yield from result.items()


def _unsaid(dialogue: Dialogue) -> set[str]:
    """Arguments that no message before their call contains: an alias, a date in words, a default."""
    said, unsaid = "", set()
    for message in dialogue["messages"]:
        for call in message.get("tool_calls", ()):
            arguments = json.loads(call["function"]["arguments"]).values()
            unsaid |= {value for value in arguments if value.lower() not in said}
        said += message["content"].lower() + "\n"
    return unsaid


def _enum_values(tool: dict) -> Iterator[str]:
    for schema in tool["function"]["parameters"]["properties"].values():
        yield from schema.get("enum", ())


def _other_number(value: str, rng: random.Random) -> str:
    """A random number with as many digits, without a new leading zero."""
    digits = (rng.choice("0123456789") if d.isdigit() else d for d in value[1:])
    return (rng.choice("123456789") if value[0] != "0" else "0") + "".join(digits)


def _map_strings(dialogue: Dialogue, change: Callable[[str], str]) -> None:
    """Apply `change` to everything said, asked for and returned."""
    for message in dialogue["messages"]:
        if message["role"] == "tool":
            results = json.loads(message["content"])
            results = [{slot: change(value) for slot, value in result.items()} for result in results]
            message["content"] = json.dumps(results, ensure_ascii=False)
        else:
            message["content"] = change(message["content"])
    for call in _calls(dialogue):
        arguments = json.loads(call["function"]["arguments"])
        arguments = {slot: change(value) for slot, value in arguments.items()}
        call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)


def _replace(dialogue: Dialogue, swaps: dict[str, str]) -> None:
    """Replace whole words, longest value first; short single words only in their own case."""
    swaps |= {
        f"{int(old):,}": f"{int(new):,}" for old, new in swaps.items() if old.isdigit() and int(old) > 999
    }
    if not swaps:
        return
    by_lower = {old.lower(): (old, new) for old, new in swaps.items()}
    longest = sorted(swaps, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w:-])(?:{'|'.join(map(re.escape, longest))})(?![\w:])", re.IGNORECASE)

    def swap(match: re.Match[str]) -> str:
        old, new = by_lower[match[0].lower()]
        if match[0] == old:
            return new
        if " " not in old and len(old) < 5:
            return match[0]
        return new.lower() if match[0].islower() else new

    _map_strings(dialogue, lambda text: pattern.sub(swap, text))


def _ordinal(day: int) -> str:
    return f"{day}{'th' if 10 < day < 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def _move_dates(dialogue: Dialogue, rng: random.Random) -> None:
    """Move all dates by the same number of days within a month, perhaps another one than March."""
    said = " ".join(m["content"] for m in dialogue["messages"] if m["role"] in ("user", "assistant"))
    days = {int(match) for _, value in _values(dialogue) for match in DATE.findall(value)}
    if (
        not days
        or RELATIVE.search(said)
        or not all(re.search(rf"\b{day}(st|nd|rd|th)?\b", said) for day in days)
    ):
        return
    shift = rng.randint(1 - min(days), 28 - max(days)) if max(days) < 28 else 0
    month = 3 if "this month" in said or "the month" in said else rng.randint(1, 12)
    ordinals = re.compile(rf"\b({'|'.join(map(str, days))})(st|nd|rd|th)\b", re.IGNORECASE)
    named = re.compile(rf"\b(March|Mar) ({'|'.join(map(str, days))})\b", re.IGNORECASE)

    def move(text: str) -> str:
        text = DATE.sub(lambda m: f"2019-{month:02}-{int(m[1]) + shift:02}", text)
        text = named.sub(lambda m: f"{m[1]} {int(m[2]) + shift}", text)
        text = ordinals.sub(lambda m: _ordinal(int(m[1]) + shift), text)
        return re.sub(r"\b[Mm]arch\b", lambda m: MONTHS[month - 1], text)

    _map_strings(dialogue, move)


def _rename(dialogue: Dialogue, rng: random.Random) -> None:
    """Give functions and parameters other names, in one style for the whole dialogue."""
    style = rng.choice([_snake, _camel, _snake, _pascal])
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        if name not in names:
            words = re.findall(r"[A-Z]?[a-z0-9]+", name)
            fresh = style([rng.choice([word, *SYNONYMS.get(word, "").split()]) for word in words])
            names[name] = name if fresh in names.values() else fresh
        return names[name]

    for tool in dialogue["tools"]:
        function = tool["function"] = copy.deepcopy(tool["function"])
        function["name"] = renamed(function["name"])
        parameters = function["parameters"]
        parameters["properties"] = {renamed(k): v for k, v in parameters["properties"].items()}
        parameters["required"] = [renamed(k) for k in parameters["required"]]
    _rename_messages(dialogue, renamed)


def _rename_messages(dialogue: Dialogue, renamed: Callable[[str], str]) -> None:
    for call in _calls(dialogue):
        function = call["function"]
        function["name"] = renamed(function["name"])
        call["id"] = f"functions.{function['name']}:{call['id'].rsplit(':')[-1]}"
        function["arguments"] = _renamed_keys(json.loads(function["arguments"]), renamed)
    for message in dialogue["messages"]:
        if message["role"] == "tool":
            message["name"] = renamed(message["name"])
            message["tool_call_id"] = f"functions.{message['name']}:{message['tool_call_id'].rsplit(':')[-1]}"
            results = [_renamed_keys(result, renamed) for result in json.loads(message["content"])]
            message["content"] = f"[{', '.join(results)}]"


def _renamed_keys(values: dict[str, str], renamed: Callable[[str], str]) -> str:
    """The object as JSON under its new keys, which are sorted as they were before."""
    return json.dumps(
        {renamed(key): value for key, value in values.items()}, ensure_ascii=False, sort_keys=True
    )


def _snake(words: list[str]) -> str:
    return "_".join(words).lower()


def _camel(words: list[str]) -> str:
    return words[0].lower() + "".join(word.capitalize() for word in words[1:])


def _pascal(words: list[str]) -> str:
    return "".join(word.capitalize() for word in words)
