"""`moebox run`: one prompt, one answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moebox.commands.options import (
    answer_options,
    field_options,
    json_option,
    model_argument,
    take_options,
    take_sampling,
)
from moebox.commands.output import load_model
from moebox.runtime.engine.options import LoadOptions


@click.command()
@model_argument()
@field_options(LoadOptions)
@click.argument("prompt")
@answer_options
@json_option
def run(
    model: Path,
    prompt: str,
    system: str | None,
    tools: Path | None,
    thinking: bool,
    as_json: bool,
    **rest: Any,
) -> int:
    """Answer one prompt and leave; "-" reads the prompt from stdin.

    The answer goes to stdout, reasoning and figures to stderr.

    \b
    Examples:
      moebox run out/tiny-k2 "Find me a Thai restaurant in San Jose." --tools tools.json
      git diff | moebox run /nvme/k2 - --system "Review this change." --json
    """
    from moebox.runtime.terminal import run as one_shot

    options = one_shot.RunOptions(prompt, system, tools, thinking, as_json, take_sampling(rest))
    return one_shot.main(load_model(model, take_options(LoadOptions, rest)), options)
