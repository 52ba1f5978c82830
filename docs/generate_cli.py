"""Write `docs/cli.md` from the commands themselves; `--check` compares instead, for CI."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moebox.cli import main_group

TARGET = Path(__file__).parent / "cli.md"


def render() -> str:
    """The help of every command as Markdown, at a fixed width."""
    parts = ["# Command line\n\nWritten by `make docs` from the commands' own help; do not edit.\n"]
    parts.append(_section(main_group, "moebox"))
    for name in sorted(main_group.commands):
        parts.append(_section(main_group.commands[name], f"moebox {name}"))
    return "\n".join(parts)


def _section(command: click.Command, title: str) -> str:
    context = click.Context(
        command, info_name=title, max_content_width=100, terminal_width=100, **command.context_settings
    )
    return f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if TARGET.read_text() == render() else "docs/cli.md is out of date: run `make docs`")
    TARGET.write_text(render())
