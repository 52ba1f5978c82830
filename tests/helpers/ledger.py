"""Requests for tests of the ledger and of reports."""

from dataclasses import fields, replace

from moebox.cost.usage import Joules, RequestRecord, Traffic, Usage

NOON_S = 1_795_348_800.0
FIGURES = frozenset(part.name for part in fields(Usage))


def make_record(**values):
    """A `RequestRecord` from its own fields and those of its `Usage`, side by side."""
    figures = {name: values.pop(name) for name in FIGURES & values.keys()}
    return RequestRecord(**values, usage=Usage(**figures))


def changed(record, **values):
    """`record` with other values of its own fields, and of those of its `Usage`."""
    figures = {name: values.pop(name) for name in FIGURES & values.keys()}
    return replace(record, **values, usage=replace(record.usage, **figures))


def record(id, begun_s=NOON_S, **values):
    """A request with a value in every field, each different from the others."""
    full = make_record(
        id=id,
        begun_s=begun_s,
        model="kimi-k2",
        user="ada",
        prompt_tokens=100,
        cached_tokens=40,
        completion_tokens=25,
        queue_s=0.125,
        prefill_s=1.5,
        decode_s=2.75,
        finish_reason="stop",
        energy=(Joules("gpu", 812.5, "counter"), Joules("dram", 3.25, "estimated")),
        traffic=Traffic(1, 2, 3, 10**12, 5, 6),
    )
    return changed(full, **values)
