"""What a loaded model keeps of its routing: router statistics, and a trace where one was asked for."""

from __future__ import annotations

import atexit
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


class Placed(Protocol):
    """Experts that can say where they lie."""

    def placement(self) -> npt.NDArray[np.uint8]:
        """uint8 [L, E] of `counts.TIERS`."""
        ...


@dataclass(frozen=True)
class Recording:
    """Who is told what the router picks; `close` saves it, and so does the end of the program.

    A garbage collection does not: it may come in the middle of anything, and saving is Python that must not.

    Attributes:
        statistics: of this model, from earlier runs and this one; None: not wanted.
        recorder: to be told; None: nobody wants to know.
    """

    statistics: RouterStatistics | None = None
    recorder: RoutingRecorder | None = None

    def placed_by(self, experts: Placed) -> None:
        """Keep where `experts` lie, too, as long as they are there."""
        if self.statistics is not None:
            there = weakref.ref(experts)
            self.statistics.placement = lambda: None if (living := there()) is None else living.placement()

    def close(self) -> None:
        """Save what was recorded."""
        atexit.unregister(self.close)
        if self.recorder is not None:
            self.recorder.close()


def open_recording(checkpoint: Checkpoint, statistics: bool, record_trace: Path | None) -> Recording:
    """Open what a load was asked for.

    Args:
        checkpoint: whose routing.
        statistics: whether to use and keep the model's statistics.
        record_trace: a file for all picks of this run.

    Raises:
        RequestError: `record_trace` cannot be written.
    """
    identity = ModelIdentity.of(checkpoint.folder, checkpoint.config)
    known = RouterStatistics.open(identity) if statistics else None
    sinks: list[Sink] = [] if known is None else [known]
    if record_trace is not None:
        sinks.append(_open_trace(record_trace, identity))
    recording = Recording(known, RoutingRecorder(*identity.shape, sinks) if sinks else None)
    atexit.register(recording.close)
    return recording


def _open_trace(path: Path, identity: ModelIdentity) -> TraceSink:
    try:
        return TraceSink(path, identity.n_experts, identity.name)
    except OSError as error:
        raise RequestError(
            f"{path}: the trace cannot be written: {error.strerror or error}",
            "Give --record-trace a file in a folder that exists and can be written.",
        ) from None
