"""Types and groups of options that several commands of `moebox` share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


class ByteSize(click.ParamType[int]):
    """A size such as `60GiB`, `64GB` or `1000000`, in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse `value`; click reports a usage error where it is no size."""
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
        """Parse `value`; an empty one is no length at all."""
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
        """Check the form of `value`; whether there is such a device turns out when it is opened."""
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
    """Some of the names that there are, such as `lru,belady`."""

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


def json_option(command: Command) -> Command:
    """Adds `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def store_option(command: Command) -> Command:
    """Adds `--store`."""
    return click.option(
        "--store",
        "stores",
        type=click.Path(file_okay=False, path_type=Path),
        multiple=True,
        help="Folder on another drive with copies of shards, read beside MODEL's; may be repeated.",
    )(command)


def prefetch_option(command: Command) -> Command:
    """Adds `--prefetch`."""
    return click.option(
        "--prefetch/--no-prefetch",
        default=True,
        help="Read experts that the next layers are likely to need while the drives are idle.",
    )(command)


def model_options(command: Command) -> Command:
    """Adds MODEL and how to load it."""
    for option in reversed(
        (
            click.argument("model", type=click.Path(file_okay=False, path_type=Path)),
            click.option(
                "--device", type=DeviceName(), help="cpu, cuda or cuda:N.  [default: a GPU if there is one]"
            ),
            click.option(
                "--vram", type=ByteSize(), help="GPU memory to use at most.  [default: what is free]"
            ),
            click.option(
                "--ram",
                type=ByteSize(),
                help="Memory to use at most; experts beyond it are read from disk.  [default: what is free]",
            ),
            click.option(
                "--backbone",
                type=click.Choice(["bf16", "int8", "nf4"]),
                default="bf16",
                help="Precision of attention, shared experts, dense layers and head; on a GPU bf16.",
            ),
            click.option(
                "--context", type=click.IntRange(1), help="Tokens of context.  [default: the model's]"
            ),
            click.option("--threads", type=click.IntRange(1), help="Cores to use.  [default: all]"),
            store_option,
            click.option(
                "--verify-reads", is_flag=True, help="Compare every expert that is read with its checksum."
            ),
            prefetch_option,
            click.option(
                "--statistics/--no-statistics",
                default=True,
                help="Learn which experts are used, and start with those that were.",
            ),
            click.option(
                "--record-trace",
                type=click.Path(dir_okay=False, path_type=Path),
                help="Write the experts that the router picks to this file.",
            ),
            click.option(
                "--ledger/--no-ledger",
                default=True,
                help="Keep what each answer used, never what it said, for `moebox cost`.",
            ),
            click.option("--user", help="Who asks, for the ledger.  [default: the login name]"),
        )
    ):
        command = option(command)
    return command


LOADING = (
    *("device", "vram", "ram", "backbone", "context", "threads"),
    *("stores", "verify_reads", "prefetch", "statistics", "record_trace", "ledger", "user"),
)
"""Names of what `model_options` adds beside MODEL, as `moebox.load` has them."""


def answer_options(command: Command) -> Command:
    """Adds what an answer depends on; without a value the checkpoint's own defaults hold."""
    for option in reversed(
        (
            click.option("--system", help="System prompt.  [default: the template's]"),
            click.option(
                "--tools",
                type=click.Path(dir_okay=False, path_type=Path),
                help="JSON file of function declarations.",
            ),
            click.option("--think/--no-think", "thinking", default=True, help="Reason before the answer."),
            click.option("--max-tokens", type=click.IntRange(1), help="Tokens to generate at most."),
            click.option("--temperature", type=click.FloatRange(0), help="0 is greedy."),
            click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus mass kept."),
            click.option("--top-k", type=click.IntRange(0), help="Most likely tokens kept; 0: all."),
            click.option(
                "--min-p", type=click.FloatRange(0, 1), help="Share of the best token's probability."
            ),
            click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True), help="1: none."),
            click.option(
                "--seed", type=click.IntRange(0), help="Same seed, same text.  [default: a new one]"
            ),
            click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        )
    ):
        command = option(command)
    return command
