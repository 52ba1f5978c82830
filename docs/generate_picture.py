"""Write `docs/demo.svg`, the README's picture, by running `moebox demo` on a recorded console."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moebox.commands.demo import run_demo

TARGET = Path(__file__).parent / "demo.svg"

WIDTH = 92


def record() -> Console:
    """A console that remembers what it is shown."""
    return Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)


if __name__ == "__main__":
    console = record()
    console.print(Text("$ moebox demo", style="bold green"))
    run_demo(console, Console(stderr=True))
    # Print once more as whole lines: spans of streamed pieces would lose the spaces between them.
    picture = record()
    picture.print(Text.from_ansi(console.export_text(styles=True)))
    svg = picture.export_svg(title="moebox")
    # rich links a font on the network; showing the picture should fetch nothing.
    TARGET.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))
