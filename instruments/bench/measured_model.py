"""The model that a benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass

from moebox.config import ModelConfig
from moebox.offload.machine.floor import BackboneBytes, backbone_bytes


@dataclass(frozen=True)
class MeasuredModel:
    """The model of a run, and the depth that a shallow run stands for.

    Attributes:
        name: of the checkpoint's folder, or of the shape.
        config: of the model that runs.
        full_moe_layers: MoE layers of the whole model; more than `moe_layers` if the run is shallow.
        item_bytes: bytes of one element of the backbone.
    """

    name: str
    config: ModelConfig
    full_moe_layers: int
    item_bytes: int = 2

    @property
    def moe_layers(self) -> int:
        """L of the run."""
        return len(self.config.moe_layers)

    @property
    def backbone(self) -> BackboneBytes:
        """Bytes that a token reads besides experts."""
        return backbone_bytes(self.config, self.item_bytes)
