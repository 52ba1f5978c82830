"""Which experts should stay? tiny-k2's routing of dialogues, replayed with every policy.

    python benchmarks/policy.py out/tiny-k2 --dialogues dev.jsonl.xz --traces out/traces

Records what the router picks when the model reads dialogues (`--traces` keeps that for the next time; some
minutes), then replays it with 10, 20 and 30 % of the experts resident. Every token counts as decoded, prompts
too, and each order starts with nothing learned. The dialogues are of six services: the policy's constants
were chosen on three of them, `tuning`; the bars are for the other three, `held out`: at least 5 points above
LRU and within 17 points of Belady, also where dialogues of different services alternate.

Orders: `one service`, its dialogues one after the other (mean of three services); `alternating`, the
services' dialogues in turns; `every 250`, in turns of 250 tokens; `any service`, dialogues as they come.
Last, what the policy costs per layer at K2's size. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

import moebox
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS, Residency
from moebox.offload.routing.replay import POLICIES, hit_curve, hits_of_tokens
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace

BUDGETS = (0.1, 0.2, 0.3)
SHOWN = ("decayed", "score", *POLICIES[1:])
SERVICES = {
    "tuning": (
        ("BuyEventTickets", "FindEvents"),
        ("CheckBalance", "TransferMoney"),
        ("FindApartment", "ScheduleVisit"),
    ),
    "held out": (
        ("FindRestaurants", "ReserveRestaurant"),
        ("GetRide",),
        ("SearchOnewayFlight", "SearchRoundtripFlights"),
    ),
}
"""Services by group; a service is given by the tools that its dialogues declare, sorted."""
FIRST_OF_ANY = {"tuning": 400, "held out": 412}
"""Index, in the shuffled dialogues, of the first dialogue of `any service`."""
DIALOGUES = 12
TURN_TOKENS = 250
ABOVE_LRU, BELOW_BELADY = 0.05, 0.17

Dialogue = dict[str, Any]
Traces = list[RoutingTrace]


def select(path: Path, group: str) -> list[list[Dialogue]]:
    """Dialogues of each of the group's three services, then of any service."""
    with lzma.open(path, "rt") as lines:
        dialogues = [json.loads(line) for line in lines]
    random.Random(1).shuffle(dialogues)
    of_service = [
        [dialogue for dialogue in dialogues if declared(dialogue) == service][:DIALOGUES]
        for service in SERVICES[group]
    ]
    first = FIRST_OF_ANY[group]
    return [*of_service, dialogues[first : first + DIALOGUES]]


def declared(dialogue: Dialogue) -> tuple[str, ...]:
    """Names of a dialogue's tools, sorted."""
    return tuple(sorted(tool["function"]["name"] for tool in dialogue["tools"]))


def record(folder: Path, dialogues: list[Dialogue], path: Path) -> Traces:
    """A trace of each dialogue. `path` gets all as one trace, and a JSON file beside it their lengths."""
    lengths = path.with_suffix(".json")
    if not path.is_file():
        model = moebox.load(folder, device="cpu", statistics=False, record_trace=path)
        tokens = [
            model.template.render(dialogue["messages"], dialogue["tools"], add_generation_prompt=False)
            for dialogue in dialogues
        ]
        for ids in tokens:
            model.logits(ids)
        model.close()
        lengths.write_text(json.dumps([len(ids) for ids in tokens]))
    whole = RoutingTrace.load(path)
    bounds = np.cumsum(json.loads(lengths.read_text()))[:-1]
    return [RoutingTrace(ids, whole.n_experts) for ids in np.split(whole.ids, bounds)]


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The traces one after the other."""
    return RoutingTrace(np.concatenate([trace.ids for trace in traces]), traces[0].n_experts)


def in_turns(services: Sequence[Traces]) -> Traces:
    """The first trace of each service, then the second of each, and so forth."""
    return [trace for turn in zip_longest(*services) for trace in turn if trace is not None]


def pieces(traces: Traces) -> Traces:
    """Services in turns of `TURN_TOKENS` tokens."""
    whole = joined(traces)
    cuts = range(TURN_TOKENS, whole.tokens, TURN_TOKENS)
    return [RoutingTrace(ids, whole.n_experts) for ids in np.split(whole.ids, cuts)]


def replay_orders(recorded: list[Traces]) -> dict[str, list[RoutingTrace]]:
    """The traces of each order; an order's figure is the mean over its traces."""
    *services, of_any = recorded
    return {
        "one service": [joined(traces) for traces in services],
        "alternating": [joined(in_turns(services))],
        "every 250": [joined(in_turns([pieces(traces) for traces in services]))],
        "any service": [joined(of_any)],
    }


def mean_curve(traces: Sequence[RoutingTrace]) -> dict[str, list[float]]:
    """Hit rates by policy and budget."""
    curves = [hit_curve(trace, BUDGETS, SHOWN) for trace in traces]
    return {policy: np.mean([curve[policy] for curve in curves], 0).round(4).tolist() for policy in SHOWN}


def show(name: str, curve: dict[str, list[float]]) -> None:
    """Print the rows of one order."""
    print(name)
    for policy in SHOWN:
        print(f"  {policy:10}" + "".join(f"{hits:8.3f}" for hits in curve[policy]))
    for label, other in (("above LRU", "lru"), ("below Belady", "belady")):
        gaps = np.abs(np.subtract(curve["decayed"], curve[other])) * 100
        print(f"  {label:14}" + " ".join(f"{gap:.1f}" for gap in gaps) + " points")


def margins(curves: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """The worst figures over all orders and budgets."""
    above = [np.subtract(curve["decayed"], curve["lru"]).min() for curve in curves.values()]
    below = [np.subtract(curve["belady"], curve["decayed"]).max() for curve in curves.values()]
    return {"least_above_lru": round(float(min(above)), 4), "most_below_belady": round(float(max(below)), 4)}


def learning(trace: RoutingTrace) -> dict[str, list[float]]:
    """Hits at 20 %, by thousands of tokens: how good the value model is before it has learned much."""
    slots = round(0.2 * trace.layers * trace.n_experts)
    found = {}
    for policy in ("decayed", "score", "lru", "belady"):
        hits = hits_of_tokens(trace, slots, policy) / (trace.layers * trace.top_k)
        found[policy] = [round(float(hits[at : at + 1000].mean()), 3) for at in (0, 1000, 2000, 4000, 8000)]
    return found


def cost_us(layers: int = 60, n_experts: int = 384, top_k: int = 8) -> dict[str, float]:
    """CPU microseconds per layer, called from Python, 10 % resident: eviction, and the value model."""
    slots = round(0.1 * layers * n_experts)
    residency = Residency(layers * n_experts, slots + top_k, top_k, SCORE_HALF_LIFE_TOKENS, n_experts)
    spent = {"evict": 0.0, "foresee": 0.0}
    for warm, token in enumerate(synthetic_trace(60, layers, n_experts, top_k).keys()):
        residency.tick += 1
        for keys in token:
            start = time.thread_time()
            residency.use(keys)
            residency.trim()
            for key in keys.tolist():
                if residency.slot(key) < 0:
                    residency.place(key)
            middle = time.thread_time()
            residency.update_values(keys)
            if warm >= 20:
                spent["evict"] += middle - start
                spent["foresee"] += time.thread_time() - middle
    return {name: round(seconds / 40 / layers * 1e6, 1) for name, seconds in spent.items()}


def main() -> None:
    """Record, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, help="tiny-k2, quantized")
    parser.add_argument("--dialogues", type=Path, required=True, help="dev.jsonl.xz")
    parser.add_argument("--traces", type=Path, default=Path("out/traces"))
    options = parser.parse_args()
    options.traces.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"budgets": BUDGETS}
    for group in SERVICES:
        recorded = [
            record(options.model, dialogues, options.traces / f"{group.replace(' ', '-')}-{i}.npz")
            for i, dialogues in enumerate(select(options.dialogues, group))
        ]
        orders = replay_orders(recorded)
        curves = {name: mean_curve(traces) for name, traces in orders.items()}
        for name, curve in curves.items():
            show(f"{group}, {name}: {sum(trace.tokens for trace in orders[name])} tokens", curve)
        result[group] = {"hits": curves, **margins(curves), "learning": learning(orders["alternating"][0])}
    worst = result["held out"]
    result["passed"] = worst["least_above_lru"] >= ABOVE_LRU and worst["most_below_belady"] <= BELOW_BELADY
    result["cpu_us_per_layer"] = cost_us()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
