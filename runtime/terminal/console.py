"""Text for a terminal: model text without control characters, and the lines that end an answer."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, TextIO

from moebox.runtime.text.pieces import Stats

if TYPE_CHECKING:
    from rich.console import Console

# C0 without tab and newline, DEL, C1, and the marks that reorder text on the screen.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """`text` with every control character made visible, so that it contains no terminal escape sequence.

    Such sequences could move the cursor, or change the title, the clipboard or the direction of writing.
    """
    return _UNSAFE.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's control pictures: ESC becomes one small "ESC"
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def open_console(stream: TextIO) -> Console:
    """A rich console that writes text as it is: no markup, no highlighting, no wrapping.

    Styles only on a terminal, and none at all with NO_COLOR set (https://no-color.org).
    """
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR")) or not stream.isatty()
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
    )


def footer(stats: Stats) -> str:
    """One line on an answer: prompt and decode speed, time to the first token, context used."""
    usage = stats.usage
    new = stats.prompt_tokens - usage.cached_tokens
    parts = [
        f"prompt {new:,} tok ({usage.cached_tokens:,} cached) at {stats.prefill_tokens_per_s:,.1f} tok/s",
        f"answer {usage.completion_tokens:,} tok at {stats.decode_tokens_per_s:,.1f} tok/s",
        f"first token {stats.ttft_s:.2f} s",
        f"context {stats.context_used:,}/{stats.context:,}",
    ]
    return " · ".join(parts)


def ending(stats: Stats) -> str | None:
    """A line that names the limit that ended an answer; None where it ended by itself."""
    if stats.finish_reason == "length":
        return f"stopped at max_tokens = {stats.usage.completion_tokens:,}"
    if stats.finish_reason == "context":
        return f"the context of {stats.context:,} tokens is full: the answer is cut here"
    return None
