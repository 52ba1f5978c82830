"""`moebox run`: one question, one answer. The answer goes to stdout, all else to stderr."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.errors import RequestError
from moebox.runtime.generate.answer import ReceivedAnswer
from moebox.runtime.terminal.cancel import cancel_on_interrupt
from moebox.runtime.terminal.conversation import Conversation, read_tools
from moebox.runtime.terminal.cost_text import cost_dict, energy_dict
from moebox.runtime.terminal.screen import Screen
from moebox.runtime.text.pieces import Piece, Stats

if TYPE_CHECKING:
    from moebox.runtime.api import Model

logger = logging.getLogger("moebox")

INTERRUPTED = 130


@dataclass(frozen=True)
class RunOptions:
    """What `moebox run` is asked.

    `prompt` "-" is read from stdin; `tools` is a JSON file of function declarations; `sampling` holds
    fields of `SamplingOptions`.
    """

    prompt: str
    system: str | None = None
    tools: Path | None = None
    thinking: bool = True
    json: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)


def main(model: Model, options: RunOptions) -> int:
    """Answer once; the exit code: 0, or 130 after Ctrl-C.

    Raises:
        RequestError: the prompt is empty or longer than the context, or an option or a tool is wrong.
    """
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise RequestError("the prompt is empty", 'Give it as an argument, or pipe it in with "-".')
    conversation = Conversation(options.system, read_tools(options.tools) if options.tools else [])
    conversation.add_user(prompt)
    with cancel_on_interrupt() as cancel:
        pieces = _ask(model, conversation, options, cancel)
        stats = _print_json(pieces, model.name) if options.json else _print_text(pieces)
    return INTERRUPTED if stats.finish_reason == "cancelled" else 0


def _ask(
    model: Model, conversation: Conversation, options: RunOptions, cancel: threading.Event
) -> Iterator[Piece]:
    answer = model.chat(
        conversation.prompt(), conversation.tools, options.thinking, cancel=cancel, **options.sampling
    )
    for piece in answer:
        if piece.warning:
            logger.warning("%s", piece.warning)
        yield piece


def _print_json(pieces: Iterator[Piece], model: str) -> Stats:
    answer = ReceivedAnswer()
    for piece in pieces:
        answer.add(piece)
    stats = answer.stats
    usage = stats.usage
    report = {
        "model": model,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": [asdict(call) for call in answer.tool_calls],
        "finish_reason": stats.finish_reason,
        "seed": stats.seed,
        "usage": {
            **usage.of_unit("tokens"),
            "prompt_tokens": stats.prompt_tokens,
            "total_tokens": stats.prompt_tokens + usage.completion_tokens,
        },
        "energy": energy_dict(usage.energy, usage.computed_tokens),
        "traffic": asdict(usage.traffic),
        "cost": cost_dict(stats.cost, stats.currency),
        "timings": {
            **usage.of_unit("s"),
            "ttft_s": stats.ttft_s,
            "prefill_tokens_per_s": stats.prefill_tokens_per_s,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
        },
    }
    sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
    sys.stdout.flush()
    return stats


def _print_text(pieces: Iterator[Piece]) -> Stats:
    """Stream text to stdout, tool calls as one JSON line each; reasoning only to a terminal."""
    screen, answer = Screen(show_reasoning=sys.stderr.isatty(), calls_as_json=True), ReceivedAnswer()
    for piece in pieces:
        answer.add(piece)
        screen.show(piece)
    screen.end(answer.stats)
    return answer.stats
