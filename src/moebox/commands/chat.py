"""`moebox chat`: a conversation in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moebox.commands.options import (
    FILE,
    answer_options,
    field_options,
    model_argument,
    take_options,
    take_sampling,
)
from moebox.commands.output import load_model
from moebox.runtime.engine.options import LoadOptions


@click.command()
@model_argument()
@field_options(LoadOptions)
@answer_options
@click.option("--load", type=FILE, help="Go on with a chat that /save wrote.")
def chat(
    model: Path, system: str | None, tools: Path | None, thinking: bool, load: Path | None, **rest: Any
) -> int:
    """Chat in the terminal; /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    \b
    Examples:
      moebox chat out/tiny-k2 --tools tools.json
      moebox chat /nvme/k2 --context 65536 --backbone int8
    """
    from moebox.runtime.terminal import chat as terminal_chat

    options = terminal_chat.ChatOptions(system, tools, thinking, load=load, sampling=take_sampling(rest))
    return terminal_chat.main(load_model(model, take_options(LoadOptions, rest)), options)
