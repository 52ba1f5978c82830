"""Types and groups of options that several commands of `moebox` share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from moebox.option_fields import Kind, Option, options_of
from moebox.runtime.engine.options import LoadOptions

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class ByteSize(click.ParamType[int]):
    """A size such as `60GiB`, `64GB` or `1000000`; the value is in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse `value`; a usage error where it is no size."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", str(value).strip().lower())
        if not match or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size such as 60GiB, 64GB or 1000000", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


class Lengths(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens such as `512,4096`."""

    name = "lengths"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse `value`; an empty text gives no lengths."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not all(part.isdecimal() and int(part) >= 2 for part in parts):
            self.fail(f"{value!r} is not a list of lengths of at least 2, such as 512,4096", param, ctx)
        return tuple(int(part) for part in parts)


class DeviceName(click.ParamType[str]):
    """`cpu`, `cuda` or `cuda:N`."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the form of `value`; whether the device exists is found out when it is opened."""
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", str(value)):
            self.fail(f"{value!r} is not cpu, cuda or cuda:N", param, ctx)
        return str(value)


class Shares(click.ParamType[tuple[float, ...]]):
    """Shares such as `5%,10%,0.2`, as numbers above 0 and up to 1."""

    name = "shares"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse `value`."""
        if isinstance(value, tuple):
            return value
        try:
            parts = [part.strip() for part in str(value).split(",")]
            shares = tuple(
                float(part.removesuffix("%")) / (100 if part.endswith("%") else 1) for part in parts
            )
        except ValueError:
            shares = ()
        if not shares or not all(0 < share <= 1 for share in shares):
            self.fail(f"{value!r} is not a list of shares such as 5%,10%,20%", param, ctx)
        return shares


class Names(click.ParamType[tuple[str, ...]]):
    """A list of known names, such as `lru,belady`."""

    name = "names"

    def __init__(self, *names: str) -> None:
        self.names = names

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Parse `value`."""
        if isinstance(value, tuple):
            return value
        chosen = tuple(part.strip() for part in str(value).split(","))
        if not set(chosen) <= set(self.names):
            self.fail(f"{value!r}; there are {', '.join(self.names)}", param, ctx)
        return chosen


Command = Callable[..., Any]
Options = TypeVar("Options")


def add_options(command: Command, *options: Callable[[Command], Command]) -> Command:
    """`command` with options that `--help` shows in their order."""
    for option in reversed(options):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def store_option(command: Command) -> Command:
    """Adds `--store`."""
    return _click_option("stores", (), options_of(LoadOptions)["stores"])(command)


def field_options(options: type) -> Callable[[Command], Command]:
    """Adds the fields of a dataclass of options, as `moebox.option_fields` describes them."""
    defaults = {item.name: item.default for item in fields(options)}
    added = [_click_option(name, defaults[name], item) for name, item in options_of(options).items()]
    return lambda command: add_options(command, *added)


def take_options(options: type[Options], given: dict[str, Any]) -> Options:
    """The dataclass of options from what `field_options` added to a command; removes that from `given`."""
    return options(**{name: given.pop(name) for name in options_of(options)})


def _click_option(name: str, default: Any, item: Option) -> Callable[[Command], Command]:
    flag = item.flag or name.replace("_", "-")
    shown: dict[str, Any] = {"help": item.help}
    if item.kind == "switch":
        names = f"--{flag}/--no-{flag}" if default else f"--{flag}"
        return click.option(names, name, is_flag=True, default=default, **shown)
    if item.kind == "folders":
        shown["multiple"] = True
    elif item.kind == "lengths":
        shown["default"] = ",".join(map(str, default))
    elif default is not None:
        shown["default"] = default
    return click.option(f"--{flag}", name, type=_click_type(item), **shown)


def _click_type(item: Option) -> click.ParamType[Any]:
    types: dict[Kind, click.ParamType[Any]] = {
        "bytes": ByteSize(),
        "choice": click.Choice(item.choices),
        "device": DeviceName(),
        "file": FILE,
        "folders": FOLDER,
        "lengths": Lengths(),
        "number": click.IntRange(item.least),
        "text": click.STRING,
    }
    return types[item.kind]


def model_argument(*, required: bool = True) -> Callable[[Command], Command]:
    """Adds MODEL, a checkpoint's folder."""
    return click.argument("model", type=FOLDER, required=required)


def answer_options(command: Command) -> Command:
    """Adds the options of an answer; the checkpoint's defaults replace those that are not given."""
    return add_options(
        command,
        click.option("--system", help="System prompt.  [default: the template's]"),
        click.option("--tools", type=FILE, help="JSON file of function declarations."),
        click.option("--think/--no-think", "thinking", default=True, help="Reason before the answer."),
        click.option("--max-tokens", type=click.IntRange(1), help="Tokens to generate at most."),
        click.option("--temperature", type=click.FloatRange(0), help="0 is greedy."),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            help="Probability mass of the tokens that are kept.",
        ),
        click.option("--top-k", type=click.IntRange(0), help="Most likely tokens kept; 0: all."),
        click.option(
            "--min-p",
            type=click.FloatRange(0, 1),
            help="Least probability of a token, as a share of the best one's.",
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(0, min_open=True),
            help="Penalty of tokens that were seen before; 1: none.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Same seed, same text.  [default: a new one]"),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
    )


def take_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Removes from `given` the fields of `SamplingOptions`; returns those that have a value."""
    from moebox.runtime.generate.sampling import SamplingOptions

    values = {item.name: given.pop(item.name) for item in fields(SamplingOptions)}
    return {name: value for name, value in values.items() if value not in (None, ())}
