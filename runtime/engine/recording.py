"""What a loaded model records of its routing: router statistics, and a trace where one was asked for."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moebox.errors import RequestError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.recorder import RoutingRecorder, Sink, TraceSink
from moebox.offload.routing.statistics import RouterStatistics


class RecordedExperts(Protocol):
    """Routed experts that pass the router's picks to a recorder, and report where each expert lies."""

    recorder: RoutingRecorder | None

    def placement(self) -> npt.NDArray[np.uint8]:
        """uint8 [L, E] of indices of `experts.TIERS`."""
        ...


@dataclass(frozen=True)
class Recording:
    """Where a loaded model's picks are recorded.

    Attributes:
        statistics: of this model, from earlier runs and this one; None where a load does without them.
        recorder: takes the picks; None where neither statistics nor a trace are kept.
    """

    statistics: RouterStatistics | None = None
    recorder: RoutingRecorder | None = None

    def connect(self, experts: RecordedExperts) -> None:
        """Record the picks of `experts`; the statistics also save where each expert lies."""
        experts.recorder = self.recorder
        if self.statistics is not None:
            reference = weakref.ref(experts)  # the statistics may outlive the experts
            self.statistics.placement = lambda: None if (alive := reference()) is None else alive.placement()

    def close(self) -> None:
        """Save what was recorded."""
        if self.recorder is not None:
            self.recorder.close()


def open_recording(checkpoint: Checkpoint, statistics: bool, record_trace: Path | None) -> Recording:
    """Open the statistics and the trace that a load asks for.

    Args:
        checkpoint: the model's.
        statistics: whether to use and keep the model's statistics.
        record_trace: the file that gets all picks of this run.

    Raises:
        RequestError: `record_trace` cannot be written.
    """
    identity = ModelIdentity.of(checkpoint.folder, checkpoint.config)
    known = RouterStatistics.open(identity) if statistics else None
    sinks: list[Sink] = [] if known is None else [known]
    if record_trace is not None:
        sinks.append(_open_trace(record_trace, identity))
    return Recording(known, RoutingRecorder(*identity.shape, sinks) if sinks else None)


def _open_trace(path: Path, identity: ModelIdentity) -> TraceSink:
    try:
        return TraceSink(path, identity.n_experts, identity.name)
    except OSError as error:
        raise RequestError(
            f"{path}: the trace cannot be written: {error.strerror or error}",
            "Give --record-trace a file in a folder that exists and can be written.",
        ) from None
