"""What the command line needs to offer the fields of a dataclass of options.

A field with `metadata=option(...)` is an option of every command that takes the dataclass: the option's name,
its default and its place in `--help` are the field's. A field without it is for Python only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

Kind = Literal["bytes", "choice", "device", "file", "folders", "lengths", "number", "switch", "text"]

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """How the command line offers a field.

    Attributes:
        kind: what is given: a size in bytes, one of `choices`, a device's name, a file, folders (the option
            is repeated), lengths in tokens, a whole number, on or off, or any text.
        help: the text in `--help`; it names the default where the field's is None.
        flag: the option's name where the field's does not serve.
        least: the smallest number.
        choices: the names of which one is given.
    """

    kind: Kind
    help: str
    flag: str | None = None
    least: int = 1
    choices: tuple[str, ...] = ()


def option(kind: Kind, help: str, **more: Any) -> dict[str, Option]:
    """The metadata of a field that is an option; arguments are those of `Option`."""
    return {_KEY: Option(kind, help, **more)}


def options_of(dataclass: type) -> dict[str, Option]:
    """The fields that the command line offers, in their order."""
    return {item.name: item.metadata[_KEY] for item in fields(dataclass) if _KEY in item.metadata}


def same_option(dataclass: type, name: str) -> dict[str, Option]:
    """The metadata of a field that another dataclass has, too."""
    return {_KEY: options_of(dataclass)[name]}
