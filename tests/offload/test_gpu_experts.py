"""Building and filling the tiers, injected routing, and prompts and tokens that take turns."""

import pytest
import torch

from helpers.offload.store import cpu_experts
from helpers.offload.tiers import (
    EXPERTS,
    FIRST,
    LAYERS,
    TOP_K,
    Oracle,
    build,
    check_places,
    decode,
    random_chunk,
    small_config,
)
from helpers.runtime import make_checkpoint
from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.disk.store import ExpertStore
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.memory.ram_slab import RamSlab


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: at these sizes torch's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle():
    return Oracle(small_config())


@pytest.mark.parametrize(("slots", "exclusive"), [(0, False), (20, False), (20, True), (50, True)])
def test_all_experts_are_somewhere(slots, exclusive):
    tiers = build(StandInDevice(max_delay_us=0), slots, exclusive)
    check_places(tiers)
    assert tiers.gpu.residency.n_resident == tiers.gpu.n_cached
    assert tiers.nbytes == small_config().experts_bytes
    assert tiers.decode_host.pcie_gbps == pytest.approx(tiers.prefill.costs.pcie_gbps)
    tiers.fill_synthetic()  # once more, over the experts that are there
    check_places(tiers)


def test_a_filled_ram_warms_the_cache():
    config, device = small_config(), StandInDevice()
    ram = RamSlab(config, device=device)
    ram.fill_synthetic()
    tiers = GpuExperts.build(device, cpu.ThreadPool(1), ram, 12)
    assert tiers.gpu.residency.n_resident == 12 - TOP_K
    check_places(tiers)


@pytest.mark.parametrize(("rows", "slots", "exclusive"), [(63, 99, False), (40, 24, True)])
def test_too_little_room(rows, slots, exclusive):
    config, device = small_config(), StandInDevice()
    with pytest.raises(PlanError, match=r"64 experts; RAM holds \d+.*bytes too few\n"):
        GpuExperts.build(device, cpu.ThreadPool(1), RamSlab(config, rows, device), slots, exclusive)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_checkpoint_as_the_cpu_tier_computes_it(tmp_path, exclusive):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    config, device, pool = checkpoint.config, StandInDevice(max_delay_us=0), cpu.ThreadPool(1)
    n_keys = config.n_keys
    ram = RamSlab(config, n_keys - 6 if exclusive else n_keys, device)
    tiers = GpuExperts.build(device, pool, ram, 6 + config.num_experts_per_tok, exclusive)
    calls = []
    with ExpertStore.open(checkpoint) as store:
        tiers.load(store, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("experts", config.experts_bytes, config.experts_bytes)
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    expected = cpu_experts(checkpoint)
    hidden = torch.randn(9, config.hidden_size).bfloat16()
    ids = torch.rand(9, config.n_routed_experts).topk(config.num_experts_per_tok).indices
    weights = torch.rand(9, config.num_experts_per_tok)
    for layer in config.moe_layers:
        out = expected.forward(layer, ids, weights, hidden)
        assert (tiers.forward(layer, ids, weights, hidden) - out).norm() < 5e-3 * out.norm()


class Injected:
    """Always the same experts."""

    def prefill(self, layer, tokens):
        return (torch.arange(TOP_K) + layer).expand(tokens, TOP_K).contiguous()

    def decode(self):
        return torch.arange(LAYERS * TOP_K, dtype=torch.int32).view(LAYERS, TOP_K)


def test_injected_routing(oracle):
    tiers = build(StandInDevice(max_delay_us=0), 8)
    tiers.routing = Injected()
    ids, weights, hidden = random_chunk(12, torch.Generator().manual_seed(1))
    for layer in range(FIRST, FIRST + LAYERS):
        used = Injected().prefill(layer - FIRST, 12)
        expected = oracle.forward(layer, used, weights, hidden)
        out = tiers.forward(layer, ids, weights, hidden)
        assert (out - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize(("slots", "exclusive"), [(0, False), (4, False), (20, False), (4, True), (20, True)])
def test_prefill_and_decode_take_turns(oracle, slots, exclusive):
    tiers = build(StandInDevice(5, max_delay_us=50), slots, exclusive)
    generator = torch.Generator().manual_seed(slots)
    for n_tokens, layers in ((30, LAYERS), (40, 1), (2, LAYERS)):  # one prompt ends early, with uploads ahead
        for layer in range(FIRST, FIRST + layers):
            chunk = random_chunk(n_tokens, generator)
            expected = oracle.forward(layer, *chunk)
            assert (tiers.forward(layer, *chunk) - expected).norm() < 5e-3 * expected.norm()
        for _ in range(2):
            ids, weights, hidden = random_chunk(LAYERS, generator)
            out = decode(tiers, ids, weights, hidden)
            for layer in range(LAYERS):
                row = slice(layer, layer + 1)
                expected = oracle.forward(FIRST + layer, ids[row], weights[row], hidden[row])[0]
                assert (out[layer] - expected).norm() < 5e-3 * expected.norm()
    check_places(tiers)


def test_ticks_count_tokens():
    tiers = build(StandInDevice(max_delay_us=0), 8)
    for n_tokens in (5, 2):
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, *random_chunk(n_tokens, torch.Generator().manual_seed(2)))
    assert tiers.gpu.residency.tick == 7
    assert tiers.gpu.residency.scores()[: LAYERS * EXPERTS].sum() > 0
