"""Requests for tests of the ledger."""

from moebox.cost.usage import Joules, Traffic, Usage

NOON_S = 1_795_348_800.0


def usage(id, begun_s=NOON_S, **fields):
    """A request with a value in every field, each different from the others."""
    values = {
        "model": "kimi-k2",
        "user": "ada",
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 25,
        "queue_s": 0.125,
        "prefill_s": 1.5,
        "decode_s": 2.75,
        "finish_reason": "stop",
        "energy": (Joules("gpu", 812.5, "counter"), Joules("dram", 3.25, "estimated")),
        "traffic": Traffic(1, 2, 3, 10**12, 5, 6),
    }
    return Usage(id, begun_s, **values | fields)
