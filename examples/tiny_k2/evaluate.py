"""How well a quantized model calls tools: greedy answers of moebox, with the true history before each.

    python examples/tiny_k2/evaluate.py out/tiny-k2 --data dev.jsonl.xz --limit 100 --json

counts, over the turns in which the dialogue calls a tool: a call was made, its name is right, its
arguments are valid JSON, its arguments are equal; and over the other turns: a call was made anyway.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from dialogues import Dialogue, read_dialogues

from moebox.runtime.api import Model, load


def check(model: Model, dialogue: Dialogue, thinking: bool, counts: Counter[str]) -> None:
    """Answer every assistant turn of a dialogue and count what is right."""
    messages = dialogue["messages"]
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            answer = model.generate(messages[:turn], tools=dialogue["tools"], thinking=thinking,
                                    temperature=0.0, max_tokens=200)  # fmt: skip
            calls = [(call.name, call.arguments) for call in answer.tool_calls]
            if "tool_calls" in message:
                true = message["tool_calls"][0]["function"]
                counts.update(compare(calls, true["name"], json.loads(true["arguments"])))
            else:
                counts.update({"turns": 1, "false_calls": bool(calls)})


def compare(calls: list[tuple[str, str]], name: str, arguments: dict) -> dict[str, int]:
    """One true call against what the model called."""
    made, text = calls[0] if len(calls) == 1 else ("", "")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    right = made == name
    return {"calls": 1, "called": bool(calls), "right_name": right, "valid_json": isinstance(found, dict),
            "exact_arguments": right and found == arguments}  # fmt: skip


def report(counts: Counter[str]) -> dict[str, float]:
    """Rates; `valid_json` is a share of the calls made, the others of the true calls or turns."""
    calls, made = counts["calls"] or 1, counts["called"] or 1
    return {
        "calls": counts["calls"],
        "called": counts["called"] / calls,
        "right_name": counts["right_name"] / calls,
        "valid_json": counts["valid_json"] / made,
        "exact_arguments": counts["exact_arguments"] / calls,
        "turns": counts["turns"],
        "false_calls": counts["false_calls"] / (counts["turns"] or 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder that moebox quantize wrote")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl.xz file of dialogues")
    parser.add_argument(
        "--limit", type=int, default=100, help="dialogues, spread over the file (default: 100)"
    )
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--threads", type=int, help="cores to compute on (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    model = load(args.model, threads=args.threads)
    dialogues = read_dialogues(args.data)
    step = max(1, len(dialogues) // args.limit)
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    for dialogue in dialogues[::step][: args.limit]:
        check(model, dialogue, args.thinking, counts)
    rates = report(counts) | {"seconds": time.perf_counter() - begin}
    print(
        json.dumps(rates)
        if args.json
        else "\n".join(f"{name:16} {value:.4g}" for name, value in rates.items())
    )


if __name__ == "__main__":
    main()
