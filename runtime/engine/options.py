"""Options of loading: `moebox.load`, the engine and the command line take them from this one dataclass.

Nothing here imports torch: `moebox --help` does not wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moebox.option_fields import option

if TYPE_CHECKING:
    import torch

    from moebox.offload.experts import Progress


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model. Budgets are in bytes, `context` in tokens.

    Attributes:
        device: "cpu", "cuda" or "cuda:N"; None: the GPU if there is one. "stand-in" runs the GPU's code in
            CPU memory, for tests.
        vram: GPU memory to use; None: what is free.
        ram: memory that experts (and without a GPU everything else of the model) may take; experts beyond it
            are read from disk as they are needed. None: what is free.
        backbone: precision of everything but the routed experts: "bf16", or on the CPU "int8" or "nf4".
        dtype: `torch.bfloat16` or, on the CPU, `torch.float32`; None: bf16, but fp32 for a backbone of up to
            64 MiB on a CPU without bf16 instructions, where that is faster.
        context: tokens that a conversation may hold; None: `max_position_embeddings`, or what memory allows.
        threads: cores to compute on; None: all that this process may use.
        progress: called with ("backbone" | "memory" | "experts", bytes done, bytes in all).
        stores: folders, best on several drives, with copies of some or all shards (str or Path).
        verify_reads: compare every expert that is read with its checksum.
        prefetch: fetch experts that the next layers are likely to need: on a CPU from idle drives, on a GPU
            from RAM.
        statistics: choose the experts to keep at first by the routing of earlier runs, and learn from this
            run's; the statistics are in the user's data folder.
        record_trace: a file for the experts that were picked (str or Path).
        ledger: keep a row of what each answer used, never of what it said, for `moebox cost`.
        user: the name of the user in the ledger; None: the login name.
    """

    device: str | None = field(
        default=None, metadata=option("device", "cpu, cuda or cuda:N.  [default: a GPU if there is one]")
    )
    vram: int | None = field(
        default=None, metadata=option("bytes", "GPU memory to use at most.  [default: what is free]")
    )
    ram: int | None = field(
        default=None,
        metadata=option(
            "bytes", "Memory to use at most; experts beyond it are read from disk.  [default: what is free]"
        ),
    )
    backbone: str = field(
        default="bf16",
        metadata=option(
            "choice",
            "Precision of attention, shared experts, dense layers and head; on a GPU bf16.",
            choices=("bf16", "int8", "nf4"),
        ),
    )
    dtype: torch.dtype | None = None
    context: int | None = field(
        default=None, metadata=option("number", "Tokens of context.  [default: the model's]")
    )
    threads: int | None = field(default=None, metadata=option("number", "Cores to use.  [default: all]"))
    progress: Progress | None = None
    stores: tuple[Path, ...] = field(
        default=(),
        metadata=option(
            "folders",
            "Folder on another drive with copies of shards, read beside MODEL's; may be repeated.",
            flag="store",
        ),
    )
    verify_reads: bool = field(
        default=False, metadata=option("switch", "Compare every expert that is read with its checksum.")
    )
    prefetch: bool = field(
        default=True,
        metadata=option(
            "switch", "Read experts that the next layers are likely to need while the drives are idle."
        ),
    )
    statistics: bool = field(
        default=True,
        metadata=option("switch", "Learn which experts are used, and start with those of earlier runs."),
    )
    record_trace: Path | None = field(
        default=None, metadata=option("file", "Write the experts that the router picks to this file.")
    )
    ledger: bool = field(
        default=True,
        metadata=option("switch", "Keep what each answer used, never what it said, for `moebox cost`."),
    )
    user: str | None = field(
        default=None, metadata=option("text", "Name of the user in the ledger.  [default: the login name]")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "stores", tuple(map(Path, self.stores)))
        if self.record_trace is not None:
            object.__setattr__(self, "record_trace", Path(self.record_trace))
