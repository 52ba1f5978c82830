"""What a loaded model keeps of its routing: router statistics, and a trace where one was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moebox.errors import RequestError
from moebox.offload.checkpoint import Checkpoint
from moebox.offload.identity import ModelIdentity
from moebox.offload.record import RoutingRecorder, Sink, TraceSink
from moebox.offload.stats import RouterStatistics


@dataclass(frozen=True)
class Recording:
    """Who is told what the router picks; `close` saves it.

    Attributes:
        statistics: of this model, from earlier runs and this one; None: not wanted.
        recorder: to be told; None: nobody wants to know.
    """

    statistics: RouterStatistics | None = None
    recorder: RoutingRecorder | None = None

    def close(self) -> None:
        """Save what was recorded."""
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
    return Recording(known, RoutingRecorder(*identity.shape, sinks) if sinks else None)


def _open_trace(path: Path, identity: ModelIdentity) -> TraceSink:
    try:
        return TraceSink(path, identity.n_experts, identity.name)
    except OSError as error:
        raise RequestError(
            f"{path}: the trace cannot be written: {error.strerror or error}",
            "Give --record-trace a file in a folder that exists and can be written.",
        ) from None
