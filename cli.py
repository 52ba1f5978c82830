"""The `moebox` command: its entry point, and the exit codes of errors.

Answers go to stdout; prompts, progress and errors to stderr. Exit codes: 0 done, 1 a moebox error,
2 wrong usage, 130 interrupted. Every option can be given in the environment, too, as
`MOEBOX_<COMMAND>_<OPTION>`.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module

import click

from moebox.errors import MoeboxError
from moebox.version import __version__

COMMANDS = (
    "bench",
    "chat",
    "cost",
    "demo",
    "doctor",
    "inspect",
    "plan",
    "quantize",
    "run",
    "stats",
    "synth",
)
"""Files of `moebox.commands`, each with a click command of the file's name.

None of them imports torch before the command runs, so that `moebox --help` does not wait for it.
"""


@click.group(
    context_settings={
        "auto_envvar_prefix": "MOEBOX",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(__version__, "-V", "--version", message="moebox %(version)s")
def main_group() -> None:
    """Run trillion-parameter mixture-of-experts models of the Kimi K2 family on one box.

    Every option can also be given in the environment as MOEBOX_COMMAND_OPTION, for example
    MOEBOX_CHAT_CONTEXT=32768.
    """


for _name in COMMANDS:
    main_group.add_command(getattr(import_module(f"moebox.commands.{_name}"), _name))


class _DimLines(logging.Handler):
    """Shows the library's notices as one dim line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`."""
        click.secho(f"moebox: {record.getMessage()}", dim=True, err=True)


def main() -> None:
    """Entry point: run a command, turn errors into messages and exit codes."""
    logging.getLogger("moebox").addHandler(_DimLines())
    try:
        code = main_group.main(standalone_mode=False)
    except MoeboxError as error:
        click.secho(f"moebox: {error.what}", fg="red", err=True)
        if error.fix:
            click.echo(error.fix, err=True)
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:  # the reader of stdout has closed it, as in `moebox inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
