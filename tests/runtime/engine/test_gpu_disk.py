"""A GPU, and experts on disk: failing drives, copies, checksums, recordings and statistics."""

import shutil

import numpy as np
import pytest
import torch

from helpers.offload.gpu import PLACEMENTS
from helpers.paths import TINY_K2
from moebox.errors import CheckpointError
from moebox.offload.experts import TIERS
from moebox.offload.routing.trace import RoutingTrace
from moebox.quantize.convert import quantize
from moebox.runtime.api import load
from moebox.runtime.engine.base import Runner

CONTEXT = 256
TOKENS = torch.randint(0, 3800, (70,), generator=torch.Generator().manual_seed(4)).tolist()
EIO = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-disk") / "int4"
    quantize(TINY_K2, folder)
    return folder


@pytest.fixture(scope="module")
def in_memory(folder):
    with load(folder, device="stand-in", context=CONTEXT, statistics=False) as model:
        assert not model.engine.plan.cold
        yield model


def load_cold(in_memory, name="cold", **options):
    """The same model with some of its experts on disk only."""
    engine = in_memory.engine
    options = {"statistics": False} | PLACEMENTS[name].budgets(engine.config, CONTEXT) | options
    return load(engine.folder, device="stand-in", context=CONTEXT, **options)


def reader_of(model):
    return model.engine.runner.experts.cold.store.reader


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def same_routing(in_memory, session, tokens):
    """Whether the next logits equal those with all experts in memory; a pick between nearly equal scores may
    differ."""
    expected = in_memory.engine.logits(tokens)[-1]
    return relative(session.prefill(tokens), expected) < 0.2


@pytest.mark.slow
def test_a_failed_read_loses_one_token_and_names_the_expert(in_memory):
    with load_cold(in_memory) as model:
        session = model.engine.session()
        session.prefill(TOKENS[:40])
        reader_of(model).inject(str(model.engine.folder), "error", EIO, 0, 1)
        done = 40
        with pytest.raises(CheckpointError, match=r"model.*safetensors: .*experts\.\d+.*byte \d+: .*\nCheck"):
            for token in TOKENS[40:]:
                session.decode(token)
                done += 1
        assert session.tokens == TOKENS[:done]
        for token in TOKENS[done:]:
            session.decode(token)
        assert session.tokens == TOKENS
        assert same_routing(in_memory, session, [*TOKENS, 7])


def test_a_failed_read_of_a_prompt(in_memory):
    with load_cold(in_memory) as model:
        session = model.engine.session()
        reader_of(model).inject(str(model.engine.folder), "error", EIO, 5, 1)
        with pytest.raises(CheckpointError, match="Input/output error"):
            session.prefill(TOKENS)
        assert session.tokens == []
        assert same_routing(in_memory, session, TOKENS)


@pytest.mark.slow
def test_a_drive_that_fails_beside_a_copy_is_reported(in_memory, tmp_path, caplog):
    """Decoding goes on with the copy."""
    copy = tmp_path / "copy"
    shutil.copytree(in_memory.engine.folder, copy)
    with load_cold(in_memory, stores=[copy]) as model:
        session = model.engine.session()
        session.prefill(TOKENS[:40])
        reader_of(model).inject(str(model.engine.folder), "error", EIO)
        for token in TOKENS[40:]:
            session.decode(token)
        assert "this copy is not used any more" in caplog.text
        assert same_routing(in_memory, session, [*TOKENS, 7])


def test_verify_reads_finds_damaged_bytes(in_memory):
    with load_cold(in_memory, verify_reads=True) as model:
        session = model.engine.session()
        session.prefill(TOKENS[:8])
        reader_of(model).inject(str(model.engine.folder), "flip", 0x10)
        with pytest.raises(CheckpointError, match="checksum"):
            for token in TOKENS[8:]:
                session.decode(token)


@pytest.mark.slow
def test_picks_are_recorded_and_decide_the_next_placement(in_memory, tmp_path, monkeypatch):
    """Picks of prompts and answers, in order. The next load puts the most used experts on the GPU."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    trace = tmp_path / "trace.npz"
    for _ in range(2):
        with load_cold(in_memory, statistics=True, record_trace=trace) as model:
            placement = model.engine.runner.experts.placement()
            residency = model.engine.runner.experts.gpu.residency
            scores = residency.scores()
            session = model.engine.session()
            session.prefill(TOKENS[:40])
            for token in TOKENS[40:50]:
                session.decode(token)
    recorded = RoutingTrace.load(trace)
    config = in_memory.engine.config
    assert recorded.ids.shape == (50, len(config.moe_layers), config.num_experts_per_tok)
    counts = np.bincount((recorded.ids + config.n_routed_experts * np.arange(7)[:, None]).reshape(-1))
    assert scores.max() > 0
    on_gpu = np.flatnonzero(placement.reshape(-1) == TIERS.index("GPU"))
    in_ram = np.flatnonzero(placement.reshape(-1) == TIERS.index("RAM"))
    on_disk = np.flatnonzero(placement.reshape(-1) == TIERS.index("drive"))
    counts = np.resize(counts, placement.size)
    assert counts[on_gpu].mean() > 2 * counts[in_ram].mean() > 4 * counts[on_disk].mean()
    assert len(on_disk) == model.engine.plan.cold


def test_it_is_a_runner(in_memory):
    """It can be closed twice."""
    runner: Runner = in_memory.engine.runner
    runner.close()
    runner.close()
