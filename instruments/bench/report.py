"""All of a benchmark's run: what ran on which machine, its ceilings, its prompts and its decoding.

Only arithmetic: `bench.py` measures, `text.py` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moebox.instruments.bench.decode_report import DecodeReport
from moebox.instruments.bench.measured_model import MeasuredModel
from moebox.instruments.bench.prefill_report import PrefillReport
from moebox.offload.machine.floor import Ceilings
from moebox.offload.prefetch.prefetch import PrefetchReport


@dataclass(frozen=True)
class BenchReport:
    """All of a run; `to_dict` is what `--json` prints.

    Attributes:
        model: the model that ran.
        machine: names and versions.
        plan: lines that say how the budgets became slots and rows.
        residents: experts on the GPU and in RAM, see `BenchTarget.residents`.
        routing: where the picks came from.
        ceilings: bandwidths and rates, measured before the run.
        prefill: a report for each prompt length.
        decode: None where no tokens were asked for.
        notes: what a reader of the figures must know.
        prefetch: what decoding read or uploaded ahead, warm-up included; None where nothing was.
    """

    model: MeasuredModel
    machine: dict[str, Any]
    plan: list[str]
    residents: dict[str, int]
    routing: dict[str, Any]
    ceilings: Ceilings
    prefill: list[PrefillReport]
    decode: DecodeReport | None
    notes: list[str] = field(default_factory=list)
    prefetch: PrefetchReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts; derived figures beside what they come from."""
        model = self.model
        return {
            "model": model.name,
            "moe_layers": model.moe_layers,
            "full_moe_layers": model.full_moe_layers,
            "expert_bytes": model.config.expert_bytes,
            "backbone_bytes_per_token": model.backbone.token(model.moe_layers),
            "machine": self.machine,
            "plan": self.plan,
            "residents": self.residents,
            "routing": self.routing,
            "ceilings": self.ceilings.to_dict(),
            "prefill": [report.to_dict() for report in self.prefill],
            "decode": None if self.decode is None else self.decode.to_dict(),
            "notes": self.notes,
            "prefetch": None if self.prefetch is None else self.prefetch.to_dict(),
        }
