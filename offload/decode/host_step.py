"""A decode step's two roads: which experts lie on the GPU, and who computes the ones that do not.

The GPU runs one program per token and meets the host at each MoE layer through flags in pinned memory. The
host's side of that, `DecodeRoads.run_token`, is C++ without the GIL: it looks the routed experts up,
publishes the slots of those that are resident, queues uploads of some misses, has the CPU compute the others
where they lie in RAM, and raises the flags that the program waits for. Nothing synchronises.

While the GPU is in the attention of the next layer, host and PCIe have nothing to do. If the GPU has guessed
what that layer will pick, some of it goes up meanwhile, in pieces, into free slots: see `csrc/ahead.h`.

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

FIELDS: tuple[str, ...] = tuple(_kernels.ROAD_FIELDS)
"""Columns of `DecodeRoads.stats`; `_s` are seconds.

hits, uploads, cpu, cold: experts found on the GPU, uploaded, computed by the CPU where they lay in RAM, and
computed by the CPU when they had been read from disk. part: what the GPU computes of an expert in RAM, from 0
to 1; the CPU has the rest of it, so that cpu is no whole number then.
wait_s: the host waited for the GPU to route. listed_s: flag seen until the GPU may go on with the hits.
schedule_s: flag seen until the uploads were queued and the CPU ran: the host's cost on the critical path.
cpu_s: the CPU's work, without cold experts. upload_s: the copies, by the device's clock (NaN until they are
known, at the latest when the next token starts). read_s: the first read's begin until the last one's end.
layer_s: flag seen until the CPU's sum was published.
early, wasted: what of the uploads was done before the layer was routed, and what was uploaded on wrong
guesses, in experts.
"""

AHEAD_FIELDS: tuple[str, ...] = tuple(_kernels.AHEAD_FIELDS)
"""What `DecodeRoads.ahead` counts.

issued: experts whose upload began on a guess. used, late, wrong: of these, were there when they were picked;
were picked, and got the rest of their bytes then; were not uploaded after all. wasted_bytes: of wrong ones.
found, picked: picks that were among the guesses, and all picks that there were guesses for.
"""


class DecodeRoads(_kernels.DecodeRoads):
    """The host's side of decoding; see the module. Keeps every object and array it is given alive.

    Between tokens, and after `settle`, others may use the residency, the slab and, in exclusive mode,
    `ram` and `ram_rows`. While `run_token` runs, nobody else may.

    Args:
        pool: computes the CPU's experts; `run_token` keeps its threads awake.
        residency: of L * E keys. An upload takes a free slot and is resident from the next layer step on,
            where the weakest residents make room until `reserve` slots are free.
        copier: of the device that holds slab and `uploaded`.
        shape: (H, I).
        ram: uint8 [rows, stride], pinned for a GPU.
        ram_rows: int32 [L * E]: a key's row or -1; changed in exclusive mode only.
        slab_address, slab_stride: the GPU's slots, in bytes.
        routed, listed, summed: int32 [L, 16], flags in element 0. The GPU raises the first and waits for
            the others.
        ids, weights: int32 and fp32 [L, k], written by the GPU. hidden: bf16 [L, H], likewise.
        hits, uploads: int32 [L, 1 + k]: a count, then slots. hit_weights, upload_weights: fp32 [L, k].
        part, part_weight: int32 [L, 4] and fp32 [L, 1]: an expert that is divided, its row in `ram` or -1,
            and the number of inner rows (of gate and up, columns of down) that the GPU computes from there.
        sums: fp32 [L, H], overwritten with the CPU's share, zeros where there is none.
        uploaded_address, uploaded_stride_bytes: device int32 flags, one per layer.
        one_address: a pinned int32 1.
        exclusive: an expert lies in RAM or in a slot, not both: a retained upload frees its row, and a
            victim is downloaded before its slot is free.
        cold: reads experts that lie in neither, which then changes `ram` and `ram_rows`, too; only with
            `exclusive`.
        guessed, guesses: int32 [L, 16], flags in element 0, and int32 [L, n], what a layer will probably
            pick, the likeliest first: raised and written by the GPU while it computes the layer before, after
            what it reads from `ram`. None: it never guesses; programs may differ in that.
        pcie_gbps, cpu_gbps: what the roads are taken for at first; live averages follow.
        isa: one of `kernels.cpu.isa_paths()`; the best by default.

    Raises:
        TypeError, ValueError: an array's dtype, shape or device is wrong; the message names it.
    """

    def __init__(
        self,
        pool: ThreadPool,
        residency: Residency,
        copier: Copier,
        *,
        shape: tuple[int, int],
        ram: Tensor,
        ram_rows: Tensor | npt.NDArray[np.int32],
        slab_address: int,
        slab_stride: int,
        routed: Tensor,
        listed: Tensor,
        summed: Tensor,
        ids: Tensor,
        weights: Tensor,
        hits: Tensor,
        hit_weights: Tensor,
        uploads: Tensor,
        upload_weights: Tensor,
        part: Tensor,
        part_weight: Tensor,
        hidden: Tensor,
        sums: Tensor,
        uploaded_address: int,
        uploaded_stride_bytes: int,
        one_address: int,
        n_experts: int,
        top_k: int,
        exclusive: bool = False,
        cold: _kernels.ColdTier | None = None,
        guessed: Tensor | None = None,
        guesses: Tensor | None = None,
        pcie_gbps: float = 50.0,
        cpu_gbps: float = 50.0,
        isa: str | None = None,
    ) -> None:
        flags = (routed, listed, summed)
        lists = (hits, hit_weights, uploads, upload_weights)
        arrays = (ram, ram_rows, *flags, ids, weights, *lists, hidden, sums, part, part_weight)
        super().__init__(
            pool,
            residency,
            copier,
            shape,
            [export_array(array) for array in arrays],
            (slab_address, slab_stride),
            (uploaded_address, uploaded_stride_bytes, one_address),
            (n_experts, top_k),
            exclusive,
            (pcie_gbps, cpu_gbps),
            isa,
            cold,
            None if guessed is None or guesses is None else (export_array(guessed), export_array(guesses)),
        )

    def run_token(
        self,
        ids: Tensor | npt.NDArray[np.int32] | None = None,
        timeout_s: float = 30.0,
        guesses: Tensor | npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Serve one token's GPU program, from its first layer's flag to its last; `clear` comes before.

        Advances `residency.tick` by one. Whatever happens, every flag is raised in the end, so that the
        program ends; after an error its result is worthless, and the residency is still right.

        Args:
            ids: int32 [L, k], distinct within a row, used instead of the mailbox's: an injected trace.
            timeout_s: for one layer's flag.
            guesses: int32 [L, n], used instead of the mailbox's from when these are there.

        Raises:
            DeviceError: the GPU did not answer in time, or a copy failed.
            ReadFailure: a cold expert could not be read; see `cold.ColdTier.reads`.
            RuntimeError: `abort` was called, or an expert id is out of range or given twice.
        """
        with _device_errors():
            super().run_token(
                None if ids is None else export_array(ids),
                timeout_s,
                None if guesses is None else export_array(guesses),
            )

    def clear(self) -> None:
        """Zero all flags: before each launch of the GPU's program, when the last one is over.

        Raises:
            DeviceError: the device does not answer.
        """
        with _device_errors():
            super().clear()

    def settle(self) -> None:
        """Wait for copies in flight and finish the changes of residency that hang on them.

        Before anyone else touches residency, slab, `ram` or `ram_rows`; cheap when nothing is in flight.

        Raises:
            DeviceError: a copy failed.
        """
        with _device_errors():
            super().settle()


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except _kernels.DeviceFailure as error:
        raise DeviceError(
            str(error), "Start again; if it comes back, see the driver's log, or use --device cpu."
        ) from None
