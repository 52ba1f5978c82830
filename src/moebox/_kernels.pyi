from collections.abc import Sequence
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = torch.Tensor | npt.NDArray[Any]

GROUP_SIZE: int
"""Weights of a row that share one INT4 scale."""
FP8_BLOCK: int
"""Rows and columns that share one FP8 scale."""
BATCH_PAIRS: int
"""Pairs of expert and token that `experts_forward` computes at a time."""

def isa_paths() -> list[str]: ...
def allowed_cpus() -> int: ...

class ThreadPool:
    """Threads that share the work of a kernel.

    With `pin`, each worker stays on a CPU of its own; the calling thread's affinity does not change. Workers
    spin for 50 microseconds after a call, then sleep. Several Python threads may use one pool; their calls
    wait for each other. A child made by fork() cannot use it.

    Args:
        threads: number of threads, the calling one included; one per allowed CPU by default.

    Raises ValueError for fewer threads than one.
    """
    def __init__(self, threads: int | None = None, pin: bool = True) -> None: ...
    @property
    def threads(self) -> int: ...

class Expert:
    """An expert's six arrays, which it keeps alive and only reads: gate and up [I, H], down [H, I], each as
    packed int32 and bf16 scales.

    Raises TypeError or ValueError that names the array, what was given and what is needed.
    """
    def __init__(
        self,
        gate_packed: Array,
        gate_scale: Array,
        up_packed: Array,
        up_scale: Array,
        down_packed: Array,
        down_scale: Array,
    ) -> None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def experts_forward(
    pool: ThreadPool,
    experts: Sequence[Expert],
    offsets: Array,
    tokens: Array,
    weights: Array,
    hidden: Array,
    out: Array,
    isa: str | None = None,
) -> None:
    """Add each expert's output for its tokens to `out`; arguments as in `kernels.cpu.experts_forward`."""

def read_bandwidth(pool: ThreadPool, arrays: Sequence[Array], isa: str | None = None) -> float:
    """GB/s at which the pool reads the arrays once, in order."""

def peak_gflops(pool: ThreadPool, isa: str | None = None) -> float:
    """GFLOP/s of multiply-adds in registers, in the unit that `isa` uses for many tokens."""

def quantize_int4(
    weight: npt.NDArray[np.uint8],
    dtype: str,
    scale_inv: npt.NDArray[np.float32] | None,
    packed: npt.NDArray[np.int32],
    scale: npt.NDArray[np.uint16],
    threads: int,
    isa: str | None,
) -> tuple[int, int, float, float, float]:
    """Write INT4 values and scales of a matrix; see `moebox.quantize.int4.quantize_int4`.

    Args:
        weight: the matrix's bytes, [rows, row bytes].
        dtype: of its elements, as safetensors spells it: F32, BF16, F16 or F8_E4M3.
        scale_inv: [ceil(rows / 128), ceil(columns / 128)], with F8_E4M3 only.
        packed: [rows, columns / 8], written.
        scale: bf16 bits [rows, columns / 32], written.

    Returns:
        Row and column of the first weight that is NaN, Inf or at least 2**60, or -1 twice; then the sum of
        squared errors, the sum of squared weights, and the largest error.

    Raises TypeError or ValueError for a wrong array, also for one to be written that is read-only.
    """

def to_bfloat16(
    weight: npt.NDArray[np.uint8],
    dtype: str,
    scale_inv: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint16] | None,
    threads: int,
    isa: str | None,
) -> tuple[int, int]:
    """Write a matrix as bf16 bits to `out` [rows, columns], or with None only check it; see `quantize_int4`.

    Returns row and column of the first weight that bf16 cannot hold, or -1 twice.
    """

class Policy(Enum):
    """Which expert is evicted. decayed: the lowest value, as in the caches. score: the lowest score. lru: the
    oldest last use. lfu: the fewest uses. belady: the latest next use.
    """

    decayed = ...
    score = ...
    lru = ...
    lfu = ...
    belady = ...

def replay_hits(
    ids: Array, n_experts: int, slots: int, policy: Policy, half_life: float
) -> npt.NDArray[np.int32]:
    """Hits of each token [T] of a trace, int32 [T, L, k], with `slots` experts resident."""

SCORE_HALF_LIFE_TOKENS: float
"""Half-life of an expert's score. On traces of a small model of the family 8 to 32 were best."""

class Residency:
    """Which key has which slot, and which key is evicted first.

    A key's score counts its uses, and halves every `half_life` ticks. A resident's value is its score, or
    what `update_values` estimated since. The weakest key has the lowest value divided by the number of layer
    steps until its layer's turn; of equal ones, the higher key is the weaker.

    Plain bookkeeping: it moves no bytes and is not thread-safe. Scores are kept for all keys.

    Args:
        n_keys: keys are 0 .. n_keys - 1.
        n_slots: slots are 0 .. n_slots - 1; 0 is allowed.
        reserve: slots that `trim` keeps free for uploads; below n_slots, or 0.
        half_life: in ticks.
        n_experts: keys of a layer, a divisor of n_keys; 0: all are of one layer, and `update_values` does
        nothing.

    Raises ValueError for a key, a number or a state that is not allowed.
    """
    def __init__(
        self,
        n_keys: int,
        n_slots: int,
        reserve: int,
        half_life: float = SCORE_HALF_LIFE_TOKENS,
        n_experts: int = 0,
    ) -> None: ...
    tick: int
    @property
    def n_keys(self) -> int: ...
    @property
    def n_slots(self) -> int: ...
    @property
    def reserve(self) -> int: ...
    @property
    def n_free(self) -> int: ...
    @property
    def n_resident(self) -> int: ...
    def slots(self) -> npt.NDArray[np.int32]:
        """int32 [n_slots]: each slot's key, or -1; a copy."""
    def table(self) -> npt.NDArray[np.int32]:
        """int32 [n_keys]: each key's slot, or -1; a copy."""
    def slot(self, key: int) -> int:
        """The key's slot, or -1."""
    def use(self, keys: Array, counts: Array | None = None) -> None:
        """Add counts (fp32 [n], 1 each by default) to the scores of keys (int32 [n]), decayed to `tick`.

        The last key's layer is the one being computed.
        """
    def update_values(self, keys: Array) -> None:
        """Have the value model learn from a layer's picks and estimate the values of the layer's residents.

        Args:
            keys: int32 [k], all keys of one layer that the token of this tick picked, after `use` of them.
        """
    def score(self, key: int) -> float:
        """The key's score, decayed to `tick`."""
    def scores(self) -> npt.NDArray[np.float32]:
        """float32 [n_keys], decayed to `tick`."""
    def seed(self, keys: Array, scores: Array) -> None:
        """Set scores (fp32 [n], as of `tick`) of keys (int32 [n])."""
    def place(self, key: int) -> int:
        """Give the key a free slot, the lowest; -1 if none is free. ValueError if it has one."""
    def release(self, key: int) -> None:
        """Free the key's slot. ValueError if it has none."""
    def weakest(self, n: int) -> list[int]:
        """Up to n resident keys, weakest first."""
    def trim(self) -> list[int]:
        """Release the weakest until `reserve` slots are free; returns their keys."""

class Copier:
    """Copies between host and device: uploads and signals in one queue, downloads in another.

    Addresses are integers. One thread at a time may use it. Raises DeviceFailure.
    """
    def attach(self) -> None:
        """Call this first on a thread that may not have used the device yet."""
    def upload(self, destination: int, source: int, nbytes: int) -> None:
        """Queue a copy from host to device."""
    def download(self, destination: int, source: int, nbytes: int) -> None:
        """Queue a copy from device to host."""
    def signal(self, flag: int, one: int) -> None:
        """Queue a copy of the int32 at `one`, which is 1, to `flag`, behind the uploads so far."""
    def clear(self, destination: int, nbytes: int) -> None:
        """Zero device memory, behind the uploads so far, and wait for it."""
    def synchronize(self) -> None:
        """Wait for all that is queued."""
    def error(self) -> str | None:
        """The first failure, or None."""

class HostCopier(Copier):
    """Copier of a stand-in device, whose memory is the host's: one thread for each queue.

    Each copy and signal waits for a random time of at most `max_delay_us` before it starts.
    """
    def __init__(self, seed: int | None = None, max_delay_us: float = 0.0) -> None: ...
    def fail_after(self, copies: int) -> None:
        """For tests: after so many more copies one fails. Later copies are skipped, signals are not."""

class CudaCopier(Copier):
    """Copier of a CUDA device, which uses two streams of the current context, given as raw handles.

    It opens the driver (libcuda.so.1) at run time. Raises DeviceFailure where there is no driver or no
    context.
    """
    def __init__(self, upload_stream: int, download_stream: int) -> None: ...

ROAD_FIELDS: list[str]
"""Columns of `HostStep.stats`; `offload.decode.host_step.FIELDS` says what they mean."""
AHEAD_FIELDS: list[str]
"""Fields of `HostStep.ahead_counts`; `offload.decode.host_step.AHEAD_FIELDS` says what they mean."""
FLAG_WORDS: int
"""int32 words of a mailbox flag: a cache line."""
SPLIT_WORDS: int
"""int32 words of `split_expert` in the mailbox, of which two are used."""

MAILBOX_FIELDS: list[tuple[str, str, tuple[str, ...], str, str, str]]
"""csrc/decode/mailbox.h's table; `offload.decode.mailbox.MailboxField` names the columns."""

def mailbox_shapes(layers: int, top_k: int, hidden_size: int, predictions: int) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape in numbers, by name."""

class DeviceFailure(RuntimeError):
    """A copy failed, or the device does not answer; `DecodeHost` raises it as `DeviceError`."""

class RamRows:
    """Which expert has which row of RAM. Plain bookkeeping: it moves no bytes and is not thread-safe.

    A key has a row in `residency` as soon as the row is its own. `table` has the row once it holds all bytes
    of the key; nothing else may write `table`.

    Args:
        table: int32 [n_keys], each key's row or -1. These rows, the first ones without a gap, are taken over.
        n_rows: of RAM.
        reserve: rows that are free before a step of decoding reads from the drive.
        half_life: of a score, in ticks.
        n_experts: keys of a layer, a divisor of n_keys.

    Raises ValueError for a key, a number or a state that is not allowed.
    """
    def __init__(
        self, table: npt.NDArray[np.int32], n_rows: int, reserve: int, half_life: float, n_experts: int
    ) -> None: ...
    @property
    def residency(self) -> Residency:
        """The scores, and the rows as its slots. Only `RamRows` places and releases keys."""
    def take_over(self) -> None:
        """Give each key the row that `table` says, and free all others. Scores stay."""
    def place(self, key: int) -> int:
        """Give the key the lowest free row; -1 if none is free. ValueError if it has one."""
    def arrived(self, key: int) -> None:
        """The key's row holds all its bytes: enter it in `table`."""
    def drop(self, key: int) -> None:
        """Free the key's row."""
    def hand_over(self, from_key: int, to_key: int) -> None:
        """Give the row of one key to another one, which `table` has no row for before `arrived`."""
    def weakest(self, n: int, busy: Sequence[int] = ()) -> list[int]:
        """Up to n keys that have a row and are not `busy`, the weakest first."""
    def make_room(self, n_free: int, busy: Sequence[int] = ()) -> None:
        """Drop the weakest keys, but none that is `busy`, until `n_free` rows are free."""

class ColdReader:
    """Reads experts that lie neither in RAM nor on the GPU into rows of RAM, while a token is decoded.

    Args:
        rows: of RAM.
        reader: of the drives.
        extents: of each key: where it lies on drives, and its XXH3-64 if it is to be verified.

    Raises ValueError where a number does not fit; sizes are checked by `HostStep`.
    """
    def __init__(
        self,
        rows: RamRows,
        reader: Reader,
        extents: list[tuple[list[tuple[int, int, int]], int | None]],
    ) -> None: ...
    @property
    def failed(self) -> int:
        """The key whose read failed last, or -1."""

class HostStep:
    """What `offload.decode.host_step.DecodeHost` wraps; arguments and methods as there."""

    def __init__(
        self,
        pool: ThreadPool,
        residency: Residency,
        copier: Copier,
        shape: tuple[int, int],
        experts: tuple[int, int],
        mailbox: dict[str, Any],
        ram: Any,
        ram_rows: Any,
        slab: tuple[int, int],
        rows: RamRows | None,
        cold: ColdReader | None,
        gbps: tuple[float, float],
        isa: str | None,
    ) -> None: ...
    def clear_flags(self) -> None: ...
    def serve_token(self, ids: Any, timeout_s: float, predicted_ids: Any = None) -> None: ...
    def abort(self) -> None:
        """From another thread or a signal handler: end the token that is being served, if there is one.

        All flags are raised, and `serve_token` raises RuntimeError.
        """
    def wait_for_copies(self) -> None: ...
    pcie_gbps: float
    """Live average of the uploads' speed; may be set."""
    cpu_gbps: float
    """Live average of the CPU's speed; may be set."""
    @property
    def stats(self) -> npt.NDArray[np.float64]:
        """float64 [L, len(ROAD_FIELDS)] of the last token; a copy."""
    piece_bytes: int
    """Size of the pieces that experts are uploaded in ahead; may be set."""
    @property
    def ahead_counts(self) -> npt.NDArray[np.int64]:
        """int64 [len(AHEAD_FIELDS)], of all tokens so far; a copy."""

class ReadFailure(RuntimeError):
    """A read that failed; `args` are (message, kind, path, offset, errno).

    kind: "io", "short_read" (the file ends too early), "changed" (since it was opened), "checksum".
    """

class Reader:
    """Reads files by threads of its own, as many on each drive as reads are to be under way at once.

    Thread-safe. Reads are cut into pieces, which all drives with a copy share out; pieces of prefetches wait
    until no other piece does. Not usable in a child made by fork().

    Args:
        depth_per_drive: threads of each drive.
        piece_bytes: a multiple of 4096.
    """
    def __init__(self, depth_per_drive: int, piece_bytes: int) -> None: ...
    def add_file(self, copies: Sequence[str], direct: bool = True) -> int:
        """Open the copies of one file, with O_DIRECT if `direct` and the file system lets it. ReadFailure."""
    def direct(self, file: int) -> bool:
        """Whether all copies are read with O_DIRECT."""
    def set_depth(self, path: str, depth: int) -> None:
        """Threads of the drive that holds one of the reader's files; at least as many as it has by now."""
    def submit(
        self,
        runs: Sequence[tuple[int, int, int]],
        target: Array,
        prefetch: bool = False,
        checksum: int | None = None,
    ) -> int:
        """Begin to read runs (file, offset, bytes) into `target` (uint8), one behind the other.

        Returns a ticket, which `wait` or `cancel` ends; the target must stay until then. With an XXH3-64 as
        `checksum` the bytes are compared when they are there.
        """
    def ready(self, ticket: int) -> bool:
        """Whether the read has ended, successfully or not."""
    def wait(self, ticket: int) -> None:
        """Wait for the read. Raises ReadFailure; after KeyboardInterrupt the ticket stays valid."""
    def promote(self, ticket: int) -> None:
        """Give a prefetch the priority of other reads."""
    def cancel(self, ticket: int) -> int:
        """Cancel the read; returns the bytes read for nothing. Nothing writes to the target afterwards."""
    def traffic(self) -> list[tuple[str, int, int, float]]:
        """Of each drive: a folder on it, depth, bytes read, seconds with at least one read under way."""
    def take_given_up(self) -> list[tuple[str, str, str, int, int]]:
        """Copies that failed while another one was left, since the last call: `ReadFailure.args` of each."""
    def inject(self, prefix: str, kind: str, value: int = 0, after: int = 0, count: int = ...) -> None:
        """For tests: what happens to reads of files whose path starts with `prefix`.

        After the first `after` of them, `count` times (always, by default). kind: "error" (value: errno),
        "shorten" (bytes at most), "flip" (what each byte is XORed with), "delay" (microseconds);
        "refuse_direct" happens to `add_file`.
        """

def xxh3_64(data: Array) -> int:
    """XXH3-64 of more than 240 contiguous bytes."""
