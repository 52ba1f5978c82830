"""The host's side of decoding: which experts of a token the GPU computes, and which the CPU.

The GPU runs one program per token. At each MoE layer it exchanges data with the host through flags in pinned
memory, and neither waits for a stream or a device. The host's side, `DecodeHost.serve_token`, is C++ that
runs without the GIL. In each layer it

1. waits until the GPU has routed the layer,
2. looks up where the chosen experts lie, and publishes the slots of those on the GPU,
3. splits the misses between two roads: it queues uploads of some, and the CPU computes the others from RAM,
4. raises the flags that the program waits for,
5. uploads experts ahead while the GPU computes the next layer's attention: if the GPU has predicted what the
   next layer will pick, these experts go to free slots in pieces (`csrc/decode/upload_ahead.h`).

L MoE layers, E experts each, k chosen per token; a key is `layer * E + expert`. H hidden_size,
I moe_intermediate_size. A slot or row holds one expert's bytes, laid out as `checkpoint/layout.py` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moebox import _kernels
from moebox._kernels import Copier, Residency, ThreadPool
from moebox.errors import DeviceError
from moebox.kernels.cpu import export_array
from moebox.offload.decode.mailbox import Mailbox

FIELDS: tuple[str, ...] = tuple(_kernels.ROAD_FIELDS)
"""Columns of `DecodeHost.stats`: figures of one layer. Names that end in `_s` are seconds.

hits, uploads, cpu, cold: experts that were resident, uploaded, computed by the CPU from RAM, and computed by
the CPU after a read from the drive. part: the share, 0 to 1, of the split expert that the GPU computes; `cpu`
counts the CPU's share of that expert.
wait_s: until the GPU had routed the layer. listed_s, schedule_s and layer_s count from that moment. listed_s:
until the GPU could compute the experts in its slots. schedule_s: until the uploads were queued and the CPU
computed; the critical path includes it. layer_s: until the CPU's sum was published.
cpu_s: the CPU's work, without cold experts. upload_s: the uploads, by the device's clock; NaN until the next
token starts at the latest. read_s: from the start of the first read to the end of the last one.
early, wasted: bytes uploaded ahead, in units of one expert: of experts that the layer then uploaded in full,
and of other experts.
"""

AHEAD_FIELDS: tuple[str, ...] = tuple(_kernels.AHEAD_FIELDS)
"""Fields of `DecodeHost.ahead_counts`.

issued: experts whose upload began before their layer was routed. used: issued experts that were picked, and
complete when the layer was routed. late: issued experts that were picked, and completed afterwards. wrong:
issued experts whose upload was not completed. wasted_bytes: bytes uploaded of wrong experts. found: picks
that were predicted. picked: all picks of layers that had predictions.
"""


class DecodeHost(_kernels.HostStep):
    """The host's side of decoding; see the module. Keeps all objects and arrays that it is given alive.

    Between tokens, and after `wait_for_copies`, others may use the residency and the slab, and in exclusive
    mode `ram` and `ram_rows`. While `serve_token` runs nothing else may.

    Args:
        pool: computes the CPU's experts. Its threads do not sleep while a token is served.
        residency: of L * E keys. An upload takes a free slot, and its expert is resident from the next layer
            step on, where the weakest residents are evicted until `reserve` slots are free.
        copier: copies to and from the device that holds the slab and `mailbox.uploaded`.
        shape: (H, I).
        mailbox: shared with the GPU's program.
        ram: uint8 [rows, stride], pinned for a GPU.
        ram_rows: int32 [L * E]: a key's row or -1.
        slab_address, slab_stride: the GPU's slots, in bytes.
        n_experts, top_k: E and k.
        rows: of `ram`, with the table `ram_rows`, in exclusive mode. There an expert lies in RAM or in a
            slot, not in both: an upload that stays frees its row, and an expert that is evicted is downloaded
            before its slot is free. None: every expert has a row, and `ram_rows` does not change.
        cold: reads experts that lie in neither; only with its `rows`.
        pcie_gbps, cpu_gbps: where the live averages of the two roads' speeds start.
        isa: one of `kernels.cpu.isa_paths()`; the best by default.

    Raises:
        TypeError, ValueError: an array's dtype, shape or device is wrong, it is read-only, or the mailbox
            lacks it; the message names it.
    """

    def __init__(
        self,
        pool: ThreadPool,
        residency: Residency,
        copier: Copier,
        *,
        shape: tuple[int, int],
        mailbox: Mailbox,
        ram: Tensor,
        ram_rows: Tensor | npt.NDArray[np.int32],
        slab_address: int,
        slab_stride: int,
        n_experts: int,
        top_k: int,
        rows: _kernels.RamRows | None = None,
        cold: _kernels.ColdReader | None = None,
        pcie_gbps: float = 50.0,
        cpu_gbps: float = 50.0,
        isa: str | None = None,
    ) -> None:
        super().__init__(
            pool,
            residency,
            copier,
            shape,
            (n_experts, top_k),
            {name: export_array(tensor) for name, tensor in mailbox.tensors.items()},
            export_array(ram),
            export_array(ram_rows),
            (slab_address, slab_stride),
            rows,
            cold,
            (pcie_gbps, cpu_gbps),
            isa,
        )

    def serve_token(
        self,
        ids: Tensor | npt.NDArray[np.int32] | None = None,
        timeout_s: float = 30.0,
        predicted_ids: Tensor | npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Serve one token's GPU program from the first layer's flag to the last's. `clear_flags` comes
        before.

        Advances `residency.tick` by one. Even after an error every flag is raised in the end, so that the
        program ends; its result is worthless then, but the residency is right.

        Args:
            ids: int32 [L, k], distinct within a row: an injected trace, used instead of the mailbox's.
            timeout_s: for one layer's flag.
            predicted_ids: int32 [L, n], used instead of the mailbox's once the GPU has raised their flag.

        Raises:
            DeviceError: the GPU did not answer in time, or a copy failed.
            ReadFailure: a cold expert could not be read; see `ColdReader.reads`.
            RuntimeError: `abort` was called, or an expert id is out of range or given twice.
        """
        with _device_errors():
            super().serve_token(
                None if ids is None else export_array(ids),
                timeout_s,
                None if predicted_ids is None else export_array(predicted_ids),
            )

    def clear_flags(self) -> None:
        """Take all flags down: before each launch of the GPU's program, after the last one has ended.

        Raises:
            DeviceError: the device does not answer.
        """
        with _device_errors():
            super().clear_flags()

    def wait_for_copies(self) -> None:
        """Wait for all copies, and make the changes of residency that depend on them.

        Call it before anything else uses residency, slab, `ram` or `ram_rows`. Cheap when no copy is under
        way.

        Raises:
            DeviceError: a copy failed.
        """
        with _device_errors():
            super().wait_for_copies()


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except _kernels.DeviceFailure as error:
        raise DeviceError(
            str(error), "Start again; if it comes back, see the driver's log, or use --device cpu."
        ) from None
