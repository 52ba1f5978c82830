"""Records what the router picks. Picks are buffered while tokens are computed, and go to sinks in blocks.

Shapes: T tokens, L MoE layers, k num_experts_per_tok. `moe` counts MoE layers from 0.
"""

from __future__ import annotations

import fcntl
import io
import logging
import math
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from moebox.offload.routing.trace import TRACE_FORMAT

log = logging.getLogger("moebox")

BLOCK_TOKENS = 32
"""Decoded tokens that go to the sinks together, because each call of a sink takes time."""

KEPT_SHARE = 0.4
"""Share of a trace's tokens that is kept where the drive is full. It is below half, since the kept tokens are
copied into the trace."""

Int32s = npt.NDArray[np.int32]


class Sink(Protocol):
    """Receives picks, in the order of the tokens."""

    def add(self, ids: Int32s, prefill: bool) -> None:
        """Take the picks int32 [T, L, k] of tokens that follow each other.

        Args:
            ids: picks of one chunk of a prompt, or of decoded tokens.
            prefill: whether the tokens are a prompt's.
        """
        ...

    def close(self) -> None:
        """Finish: no picks follow."""
        ...


class RoutingRecorder:
    """Collects a model's picks, and gives them to its sinks. Not thread-safe.

    Args:
        layers, n_experts, top_k: L, E and k.
        sinks: closed with the recorder.
    """

    def __init__(self, layers: int, n_experts: int, top_k: int, sinks: Sequence[Sink]) -> None:
        self.layers, self.n_experts, self.top_k = layers, n_experts, top_k
        self._sinks = tuple(sinks)
        self._chunk: list[npt.NDArray[np.integer]] = []
        self._decoded: list[npt.NDArray[np.integer]] = []
        self._tokens = 0

    def layer(self, moe: int, ids: npt.NDArray[np.integer]) -> None:
        """Record the picks [T, k] of MoE layer `moe`. For each chunk of tokens the layers follow from 0 on.

        The picks of a pass that ended before its last layer are dropped.
        """
        if moe == 0:
            self._chunk = []
        elif moe != len(self._chunk) or len(ids) != len(self._chunk[0]):
            self._chunk = []  # the pass's first layers were not recorded
            return
        self._chunk.append(ids.copy())  # a GPU's prompts use the same buffer for every layer
        if moe == self.layers - 1:
            self._finish()

    def token(self, ids: npt.NDArray[np.integer]) -> None:
        """Record the picks [L, k] of a decoded token."""
        self._decode([ids.copy()])

    def flush(self) -> None:
        """Give the sinks what is buffered."""
        if self._tokens:
            # Joined here, not after each token: a call of numpy is slow while experts fill the CPU's caches.
            ids = np.concatenate(self._decoded).reshape(self._tokens, self.layers, self.top_k)
            self._decoded, self._tokens = [], 0
            self._give(ids, prefill=False)

    def close(self) -> None:
        """Give the sinks what is buffered, and close them."""
        self.flush()
        for sink in self._sinks:
            sink.close()
        self._sinks = ()

    def _finish(self) -> None:
        chunk, self._chunk = self._chunk, []
        if len(chunk[0]) == 1:
            self._decode(chunk)
        else:
            self.flush()
            self._give(np.stack(chunk, axis=1), prefill=True)

    def _decode(self, picks: list[npt.NDArray[np.integer]]) -> None:
        self._decoded += picks
        self._tokens += 1
        if self._tokens == BLOCK_TOKENS:
            self.flush()

    def _give(self, ids: npt.NDArray[np.integer], prefill: bool) -> None:
        picks = ids.astype(np.int32)
        for sink in self._sinks:
            sink.add(picks, prefill)


class TraceSink:
    """Implements `Sink`: writes a `RoutingTrace` file with all tokens of prompts and answers, in order.

    Picks are appended to `.NAME.partial` beside the file, from which `close` makes the file. Where a write
    fails, one warning is logged and recording stops; the first tokens become the trace.

    Args:
        path: the trace; `close` replaces it.
        n_experts: E.
        source: stored in the trace, e.g. the model's name.

    Raises:
        OSError: the partial file cannot be written, or another process is recording to it.
    """

    def __init__(self, path: Path, n_experts: int, source: str = "") -> None:
        self.path, self.tokens = path, 0
        self._n_experts, self._source = n_experts, source
        self._dtype = np.dtype(np.int16 if n_experts <= np.iinfo(np.int16).max else np.int32)
        self._shape: tuple[int, ...] = ()
        self._partial = path.with_name(f".{path.name}.partial")
        self._file: IO[bytes] | None = self._partial.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise OSError(error.errno, "another process is recording to it") from None
        self._file.truncate(0)

    def add(self, ids: Int32s, prefill: bool) -> None:
        if self._file is None:
            return
        data = ids.astype(self._dtype).tobytes()
        self._shape = ids.shape[1:]
        try:
            if self._file.write(data) == len(data):
                self.tokens += len(ids)
                return
            reason = "the drive is full"
        except OSError as error:
            reason = error.strerror or str(error)
        self._stop(reason)

    def _stop(self, reason: str) -> None:
        """Stop recording, and shorten the partial file, so that the drive has room for the trace."""
        self.tokens = int(self.tokens * KEPT_SHARE)
        log.warning("%s: %s; recording stops, the first %d tokens stay", self.path, reason, self.tokens)
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(self.tokens * math.prod(self._shape) * self._dtype.itemsize)
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Write the trace, unless no token was recorded."""
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            if self.tokens:
                self._assemble()
        except OSError as error:
            log.warning("%s: the trace cannot be written: %s", self.path, error.strerror or error)
        finally:
            self._partial.unlink(missing_ok=True)

    def _assemble(self) -> None:
        whole = self.path.with_name(f".{self.path.name}.whole")
        fields = {"format": TRACE_FORMAT, "n_experts": self._n_experts, "source": self._source}
        try:
            with zipfile.ZipFile(whole, "w") as archive:
                for name, value in fields.items():
                    archive.writestr(f"{name}.npy", _as_npy(np.array(value)))
                self._copy_ids(archive)
            whole.replace(self.path)
        finally:
            whole.unlink(missing_ok=True)

    def _copy_ids(self, archive: zipfile.ZipFile) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.tokens, *self._shape),
        }
        with self._partial.open("rb") as picks, archive.open("ids.npy", "w", force_zip64=True) as target:
            np.lib.format.write_array_header_1_0(target, header)
            shutil.copyfileobj(picks, target)


def _as_npy(array: npt.NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
