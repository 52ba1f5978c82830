"""`moebox demo`: the bundled tiny model, quantized and asked one question that needs a tool."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebox.commands.output import new_console
from moebox.errors import CheckpointError, MoeboxError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from moebox.runtime.api import Model
    from moebox.runtime.text.pieces import Stats, ToolCall

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MODEL = "tiny-k2"
MAX_TOKENS = 256


@click.command()
def demo() -> None:
    """Quantize the bundled tiny-k2 and ask it a question that needs a tool; offline, under a minute."""
    run_demo(new_console(), new_console(stderr=True))


def run_demo(out: Console, log: Console) -> None:
    """Quantize tiny-k2 into the cache folder, ask the question of `assets/demo.json`, show each step.

    Args:
        out: shows the conversation.
        log: shows progress.

    Raises:
        MoeboxError: the installation lacks the model, the cache folder cannot be written, or the model
            does not call the tool.
    """
    folder = quantize_once(ASSETS / MODEL, log)
    script = json.loads((ASSETS / "demo.json").read_text(encoding="utf-8"))
    from moebox.runtime.api import load
    from moebox.runtime.terminal.chat import Totals
    from moebox.runtime.terminal.cost_text import cost_line

    model = load(folder, ledger=False)  # a demonstration adds no row to the ledger
    messages, tools = script["messages"], script["tools"]
    show(out, "you", messages[-1]["content"])
    call, first = answer(out, model, messages, tools)
    if call is None:
        raise MoeboxError(f"{folder}: the model answered without calling a tool")
    result = json.dumps(script["tool_result"])
    show(out, "tool result (made up)", result)
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call.to_message()]},
        {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result},
    ]
    _, second = answer(out, model, messages, tools)
    totals, prices = Totals(), model.accounts.prices
    for stats in (first, second):
        totals.add(stats)
    cost = cost_line(totals.usage, totals.cost(prices), prices.currency)
    for line in (speed_line(model, [first, second]), cost or ""):
        out.print(styled((line, "dim")))


def quantize_once(source: Path, log: Console) -> Path:
    """Quantize the bundled model into the cache folder; a finished folder is used as it is."""
    from moebox.quantize.convert import quantize

    index = source / "model.safetensors.index.json"
    if not index.exists():
        raise CheckpointError(f"{index}: the bundled model is missing", "Install moebox again.")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebox"
    # The folder's name changes with the bundled model, so that another release quantizes its own.
    folder = base / f"{MODEL}-{source_digest(source)}"
    log.print(styled((f"quantizing {MODEL} (FP8) to INT4 experts in {folder}", "dim")))
    base.mkdir(parents=True, exist_ok=True)
    quantize(source, folder)
    return folder


def source_digest(source: Path) -> str:
    """Twelve hex digits that change with any byte of the bundled model."""
    digest = hashlib.sha256()
    for path in sorted(source.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def answer(
    out: Console, model: Model, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[ToolCall | None, Stats]:
    """Stream one answer to `out`; returns the tool call, if there was one, and the figures."""
    call = None
    speaker = "tiny-k2: "
    for piece in model.chat(messages, tools, thinking=False, temperature=0.0, max_tokens=MAX_TOKENS):
        if piece.kind == "text":
            out.print(styled((speaker, "bold"), piece.text), end="")
            speaker = ""
        elif piece.tool_call is not None:
            call = piece.tool_call
            show(out, "tiny-k2 calls", f"{call.name}({call.arguments})")
        elif piece.stats is not None:
            stats = piece.stats
    if not speaker:
        out.print()
    return call, stats


def show(out: Console, speaker: str, text: str) -> None:
    """One line of the conversation."""
    out.print(styled((f"{speaker}: ", "bold"), text))


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text that is never read as markup; a part is a string, or a string and its style."""
    from rich.text import Text  # takes 50 ms, for which `moebox --help` does not wait

    return Text.assemble(*parts)


def speed_line(model: Model, answers: list[Stats]) -> str:
    """Prompt and decode rates over all answers, and the bytes of the INT4 experts."""
    prompt = sum(stats.prompt_tokens - stats.usage.cached_tokens for stats in answers)
    prefill_s = sum(stats.usage.prefill_s for stats in answers)
    decoded = sum(stats.decoded_tokens for stats in answers)
    decode_s = sum(stats.usage.decode_s for stats in answers)
    engine = model.engine
    return (
        f"prompt {prompt / prefill_s:.0f} tok/s · decode {decoded / decode_s:.0f} tok/s · "
        f"first token after {answers[0].ttft_s:.2f} s · "
        f"experts {engine.experts_bytes / 1e6:.1f} MB"
    )
