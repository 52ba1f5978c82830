"""The expert kernels against fp64, with every instruction set of this machine."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from helpers.experts import Routing, random_arrays, random_routing, reference, relative_error
from moebox.kernels import cpu

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "scalar")
SHAPES = ((32, 32), (96, 160), (224, 32), (64, 416), (1056, 96))
TOKENS = (1, 2, 5, 17, 64)
BARS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set; tests of those that this machine lacks are skipped."""
    if request.param not in cpu.isa_paths():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    """Reproducible numbers."""
    return torch.Generator().manual_seed(7)


def forward(
    arrays: list[list[torch.Tensor]],
    routing: Routing,
    hidden: torch.Tensor,
    isa: str | None = None,
    threads: int = 2,
    pool: cpu.ThreadPool | None = None,
) -> torch.Tensor:
    """`experts_forward` into zeros."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    experts = [cpu.Expert(*expert) for expert in arrays]
    cpu.experts_forward(
        pool or cpu.ThreadPool(threads),
        experts,
        routing.offsets,
        routing.tokens,
        routing.weights,
        hidden,
        out,
        isa,
    )
    return out


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("n_tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(
    isa: str, shape: tuple[int, int], n_tokens: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Odd numbers of groups, an expert without tokens, and one with fewer than the first."""
    arrays = [random_arrays(*shape, generator) for _ in range(3)]
    routing = random_routing([n_tokens, 0, n_tokens // 2 + 1], n_tokens, generator)
    hidden = torch.randn(n_tokens, shape[0], generator=generator).to(dtype)
    assert relative_error(arrays, routing, hidden, isa) < BARS[dtype]


def test_fine_sums_without_bf16_instructions(generator: torch.Generator) -> None:
    """16-bit integers are finer than bf16: the error stays far below that of rounding to bf16."""
    arrays = [random_arrays(256, 96, generator)]
    hidden = torch.randn(1, 256, generator=generator).bfloat16()
    routing = random_routing([1], 1, generator)
    assert relative_error(arrays, routing, hidden, "scalar") < 2e-6
    if "avx2" in cpu.isa_paths():
        assert relative_error(arrays, routing, hidden, "avx2") < 2e-4


@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_activations_of_any_magnitude(isa: str, magnitude: float, generator: torch.Generator) -> None:
    """Each group has a scale that follows its activations; an outlier makes only its own group coarse."""
    arrays = [random_arrays(256, 64, generator)]
    hidden = torch.randn(1, 256, generator=generator) * magnitude
    hidden[0, 5] *= 100
    assert relative_error(arrays, random_routing([1], 1, generator), hidden.bfloat16(), isa) < 5e-3


@pytest.mark.parametrize("n_tokens", [1, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_activation_shows(isa: str, value: float, n_tokens: int, generator: torch.Generator) -> None:
    """NaN and Inf reach the output of their token, and of no other."""
    arrays = [random_arrays(96, 64, generator)]
    hidden = torch.randn(n_tokens, 96, generator=generator).bfloat16()
    hidden[0, 33] = value
    out = forward(arrays, random_routing([n_tokens], n_tokens, generator), hidden, isa)
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()


def test_adds_to_out_and_repeated_tokens(isa: str, generator: torch.Generator) -> None:
    """The kernel adds to `out`, and a token may come twice."""
    arrays = [random_arrays(64, 32, generator) for _ in range(2)]
    routing = random_routing([9, 4], 3, generator, repeat=True)
    hidden = torch.randn(3, 64, generator=generator)
    out = torch.randn(3, 64, generator=generator)
    expected = reference(arrays, routing, hidden, out)
    experts = [cpu.Expert(*expert) for expert in arrays]
    cpu.experts_forward(
        cpu.ThreadPool(2), experts, routing.offsets, routing.tokens, routing.weights, hidden, out, isa
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    isa: str, dtype: torch.dtype, n_tokens: int, generator: torch.Generator
) -> None:
    """The result does not depend on which thread computes what. One token is enough work for several here."""
    arrays = [random_arrays(640, 320, generator) for _ in range(4)]
    routing = random_routing([n_tokens] * 4, n_tokens, generator)
    hidden = torch.randn(n_tokens, 640, generator=generator).to(dtype)
    first, *others = [forward(arrays, routing, hidden, isa, threads) for threads in (1, 2, 3, 4)]
    assert all(torch.equal(first, other) for other in others)


def test_a_token_alone_or_among_others(isa: str, generator: torch.Generator) -> None:
    """Other tokens in the call change a token's result by rounding only."""
    arrays = [random_arrays(128, 96, generator)]
    hidden = torch.randn(30, 128, generator=generator).bfloat16()
    together = forward(
        arrays, Routing(torch.tensor([0, 30]).int(), torch.arange(30).int(), torch.ones(30)), hidden, isa
    )
    alone = forward(
        arrays, Routing(torch.tensor([0, 1]).int(), torch.tensor([0]).int(), torch.ones(1)), hidden, isa
    )
    assert (together[0] - alone[0]).norm() / alone[0].norm() < 1e-2  # each is within 5e-3


def test_more_pairs_than_a_batch(generator: torch.Generator) -> None:
    """No pair is lost where a batch (2,048 pairs) or an item (128) ends."""
    assert cpu.BATCH_PAIRS < 1500 + 129 + 700
    arrays = [random_arrays(32, 32, generator) for _ in range(3)]
    routing = random_routing([1500, 129, 700], 1500, generator)
    hidden = torch.randn(1500, 32, generator=generator)
    assert relative_error(arrays, routing, hidden, None) < 2e-6


def test_no_tokens_and_no_experts(generator: torch.Generator) -> None:
    """A call without pairs, or without experts, adds nothing."""
    arrays = [random_arrays(64, 32, generator)]
    assert not forward(arrays, random_routing([0], 0), torch.randn(0, 64)).any()
    assert not forward([], random_routing([], 3), torch.randn(3, 64)).any()


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_arrays_at_odd_addresses(isa: str, n_tokens: int, generator: torch.Generator) -> None:
    """Arrays need the alignment of their elements alone, as in a file mapping, and may be read-only."""
    arrays = random_arrays(96, 64, generator)
    hidden = torch.randn(n_tokens, 96, generator=generator).bfloat16()
    routing = random_routing([n_tokens], n_tokens, generator)
    moved = cpu.Expert(*(misaligned(array) for array in arrays))
    out = torch.zeros(n_tokens, 96)
    cpu.experts_forward(
        cpu.ThreadPool(2),
        [moved],
        routing.offsets,
        routing.tokens,
        routing.weights,
        misaligned(hidden),
        out,
        isa,
    )
    assert torch.equal(out, forward([arrays], routing, hidden, isa))


def misaligned(array: torch.Tensor) -> np.ndarray:
    """The same numbers, read-only and one element past a cache line."""
    bits = array if array.dtype == torch.int32 else array.view(torch.uint16)
    flat = bits.numpy().reshape(-1)
    room = np.empty(flat.size + 64, flat.dtype)
    start = (-room.ctypes.data % 64) // flat.itemsize + 1
    room[start : start + flat.size] = flat
    view = room[start : start + flat.size].reshape(array.shape)
    view.flags.writeable = False
    return view


def test_an_expert_keeps_its_arrays(generator: torch.Generator) -> None:
    """The caller may delete its own references."""
    arrays = random_arrays(64, 64, generator)
    copies = [array.clone() for array in arrays]
    expert = cpu.Expert(*copies)
    del copies
    torch.randint(0, 9, (1 << 20,))
    routing, hidden = random_routing([1], 1, generator), torch.randn(1, 64, generator=generator)
    out = torch.zeros(1, 64)
    pool = cpu.ThreadPool(1)
    cpu.experts_forward(pool, [expert], routing.offsets, routing.tokens, routing.weights, hidden, out)
    assert torch.equal(out, forward([arrays], routing, hidden, threads=1))
    assert (expert.hidden_size, expert.moe_intermediate_size) == (64, 64)
    assert expert.nbytes == sum(array.nbytes for array in arrays)


def test_one_pool_from_two_python_threads(generator: torch.Generator) -> None:
    """Calls wait for each other and do not mix."""
    arrays = [random_arrays(256, 128, generator)]
    hidden = torch.randn(32, 256, generator=generator)
    routing = random_routing([32], 32, generator)
    pool = cpu.ThreadPool(2)
    expected = forward(arrays, routing, hidden, pool=pool)
    wrong: list[int] = []

    def work() -> None:
        for i in range(50):
            if not torch.equal(forward(arrays, routing, hidden, pool=pool), expected):
                wrong.append(i)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_pool_does_not_cross_fork(generator: torch.Generator) -> None:
    """In a forked child the pool raises an error and does not hang."""
    arrays = [random_arrays(64, 32, generator)]
    routing, hidden = random_routing([1], 1, generator), torch.randn(1, 64, generator=generator)
    pool = cpu.ThreadPool(2)
    forward(arrays, routing, hidden, pool=pool)
    child = os.fork()
    if child == 0:
        try:
            forward(arrays, routing, hidden, pool=pool)
        except RuntimeError as error:
            os._exit(0 if "fork" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pools(generator: torch.Generator) -> None:
    """A pool has the size that was asked for, and 0 is refused."""
    assert cpu.ThreadPool().threads == cpu.allowed_cpus() <= len(os.sched_getaffinity(0))
    assert cpu.ThreadPool(3, pin=False).threads == 3
    with pytest.raises(ValueError, match="threads: 0 given, at least 1 needed"):
        cpu.ThreadPool(0)


def test_isa_paths() -> None:
    """The scalar path is always there, and last."""
    assert cpu.isa_paths()[-1] == "scalar"
    assert [isa for isa in ISAS if isa in cpu.isa_paths()] == list(cpu.isa_paths())


WRONG_EXPERTS = {
    "up_packed": (lambda a: a[:-1], ValueError, r"up_packed: shape \[31, 8\] given, \[I=32, H/8=8\] needed"),
    "gate_scale": (lambda a: a.float(), TypeError, r"gate_scale: dtype float32 given, bfloat16 needed"),
    "down_packed": (lambda a: a.long(), TypeError, r"down_packed: dtype int64 given, int32 needed"),
    "down_scale": (
        lambda a: a.flatten(),
        ValueError,
        r"down_scale: shape \[64\] given, \[H=64, I/32=1\] needed",
    ),
    "up_scale": (lambda a: a.T.contiguous().T, ValueError, r"up_scale: not contiguous"),
}
NAMES = ("gate_packed", "gate_scale", "up_packed", "up_scale", "down_packed", "down_scale")


@pytest.mark.parametrize("name", WRONG_EXPERTS)
def test_a_wrong_expert_is_named(name: str, generator: torch.Generator) -> None:
    """The error says which array is wrong, what was given and what is needed."""
    spoil, error, message = WRONG_EXPERTS[name]
    arrays = dict(zip(NAMES, random_arrays(64, 32, generator), strict=True))
    arrays[name] = spoil(arrays[name])
    with pytest.raises(error, match=message):
        cpu.Expert(**arrays)


WRONG_CALLS = {
    "offsets": (torch.tensor([0, 3]).int(), r"offsets\[1\]: 3 given, the length of tokens, 2, needed"),
    "tokens": (torch.tensor([0, 2]).int(), r"tokens\[1\]: 2 given, a row of hidden's T=2 needed"),
    "weights": (torch.ones(3), r"weights: shape \[3\] given, \[m=2\] needed"),
    "hidden": (torch.ones(2, 32), r"out: shape \[2, 64\] given, \[T=2, H=32\] needed"),
    "out": (torch.ones(1, 64), r"out: shape \[1, 64\] given, \[T=2, H=64\] needed"),
    "isa": ("mmx", r"isa: 'mmx' cannot run here; this machine has .*scalar"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_named(name: str, generator: torch.Generator) -> None:
    """A call that would read or write out of bounds is refused by an error that names the argument."""
    value, message = WRONG_CALLS[name]
    call = {
        "pool": cpu.ThreadPool(1),
        "experts": [cpu.Expert(*random_arrays(64, 32, generator))],
        "offsets": torch.tensor([0, 2]).int(),
        "tokens": torch.tensor([0, 1]).int(),
        "weights": torch.ones(2),
        "hidden": torch.ones(2, 64),
        "out": torch.zeros(2, 64),
        "isa": None,
    }
    call[name] = value
    with pytest.raises(ValueError, match=message):
        cpu.experts_forward(**call)


def test_experts_of_two_shapes(generator: torch.Generator) -> None:
    """All experts of a call must have one shape."""
    arrays = [random_arrays(64, 32, generator), random_arrays(64, 64, generator)]
    with pytest.raises(
        ValueError, match=r"experts\[1\]: moe_intermediate_size 64 given, experts\[0\]'s I=32"
    ):
        forward(arrays, random_routing([1, 1], 1, generator), torch.ones(1, 64))
