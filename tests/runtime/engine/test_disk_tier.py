"""A model whose experts do not fit the RAM budget: same answers, clear errors, memory within the plan."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from helpers.paths import TINY_K2
from moebox.errors import CheckpointError, PlanError, RequestError
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import RoutingTrace
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth
from moebox.runtime.api import load
from moebox.runtime.engine.cpu_plan import budget_for_share, plan_cpu_memory
from moebox.runtime.engine.engine import Cancelled
from moebox.runtime.model.compute import CPU

QUESTION = [{"role": "user", "content": "I want to find an Italian restaurant in San Jose."}]
CONTEXT = 1024
TOKENS = torch.randint(0, 3800, (70,), generator=torch.Generator().manual_seed(4)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk-tier") / "int4"
    quantize(TINY_K2, folder)
    return folder


@pytest.fixture(scope="module")
def in_ram(folder):
    with load(folder, context=CONTEXT, statistics=False) as model:
        assert model.engine.plan.experts_fit
        yield model


def budget(model, share):
    return budget_for_share(model.engine.config, model.engine.dtype, "bf16", CONTEXT, share)


def with_share(in_ram, share, **options):
    """The same model with a share of its experts in RAM."""
    options = {"context": CONTEXT, "statistics": False} | options
    return load(in_ram.engine.folder, ram=budget(in_ram, share), **options)


def experts_of(model):
    return model.engine.runner.model.model.layers[-1].mlp.experts


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_answers_equal_those_with_all_experts_in_ram(in_ram, share, prefetch):
    with with_share(in_ram, share, prefetch=prefetch) as model:
        assert model.engine.plan.rows == round(share * 448)
        for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7}, {"top_p": 0.8, "seed": 8}):
            expected = in_ram.generate(QUESTION, max_tokens=10, **sampling)
            answer = model.generate(QUESTION, max_tokens=10, **sampling)
            assert answer.tokens == expected.tokens
            assert answer.text == expected.text
        counts = experts_of(model).cache.counts
        assert counts.reads > 0
        assert counts.hits > 0
        assert (experts_of(model).prefetcher is not None) == prefetch


@pytest.mark.slow
def test_logits_are_the_same_bits_in_several_chunks_and_token_by_token(in_ram, monkeypatch):
    with with_share(in_ram, 0.3) as model:
        for runner in (model.engine.runner, in_ram.engine.runner):
            monkeypatch.setattr(runner, "chunk_tokens", 24)
        assert torch.equal(model.logits(TOKENS), in_ram.logits(TOKENS))
        sessions = [model.engine.session(), in_ram.engine.session()]
        for step in range(12):
            one, other = (
                session.prefill(TOKENS[:50]) if not step else session.decode(TOKENS[50 + step])
                for session in sessions
            )
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("count", [70, 49, 48])
def test_a_long_chunk_equals_its_parts(in_ram, monkeypatch, count):
    reads = []
    with with_share(in_ram, 0.3) as model:
        monkeypatch.setattr(in_ram.engine.runner, "chunk_tokens", 24)
        expected = in_ram.logits(TOKENS[:count])
        predicted = in_ram.engine.session().prefill(TOKENS[:count])
        for chunk_tokens in (24, 72):
            monkeypatch.setattr(CPU, "part_tokens", 24)
            monkeypatch.setattr(experts_of(model), "part_tokens", 24)
            monkeypatch.setattr(model.engine.runner, "chunk_tokens", chunk_tokens)
            before = experts_of(model).cache.counts.reads
            assert torch.equal(model.logits(TOKENS[:count]), expected)
            reads.append(experts_of(model).cache.counts.reads - before)
            assert torch.equal(model.engine.session().prefill(TOKENS[:count]), predicted)
    assert reads[1] < reads[0]


def test_chunks_are_longer_where_experts_are_on_disk():
    k2 = shape_config("kimi-k2")
    half = budget_for_share(k2, torch.bfloat16, "bf16", 16384, 0.5)
    plan = plan_cpu_memory(k2, torch.bfloat16, "bf16", half, 16384, free_ram=2 * half)
    assert (plan.chunk_tokens, plan.rows) == (8192, 11520)
    assert plan.planned_bytes == half
    assert plan_cpu_memory(k2, torch.bfloat16, "bf16", half, 3000, free_ram=2 * half).chunk_tokens == 2048
    whole = plan_cpu_memory(k2, torch.bfloat16, "bf16", None, 16384, free_ram=3 * half)
    assert whole.experts_fit
    assert whole.chunk_tokens == 1024


def test_after_a_cancelled_prefill(in_ram, monkeypatch):
    with with_share(in_ram, 0.3) as model:
        monkeypatch.setattr(model.engine.runner, "chunk_tokens", 30)
        session, layers = model.engine.session(), []

        def cancel():
            layers.append(1)
            return len(layers) == 13

        with pytest.raises(Cancelled):
            session.prefill(TOKENS, cancel=cancel)
        assert session.tokens == TOKENS[:30]
        assert torch.equal(session.prefill(TOKENS), model.engine.session().prefill(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_drive_that_fails_for_a_while(in_ram, step):
    with with_share(in_ram, 0.1, prefetch=False) as model:
        session = model.engine.session()
        session.prefill(TOKENS[:20])
        reader = experts_of(model).cache.store.reader
        reader.inject("", "error", 5, after=3, count=1)
        with pytest.raises(CheckpointError, match=r"safetensors: model\.layers\..*: byte \d+"):
            for token in TOKENS[20:40]:
                session.decode(token) if step == "decode" else session.prefill(TOKENS)
        held = session.tokens
        assert held == TOKENS[: len(held)]
        assert torch.equal(model.logits(TOKENS), in_ram.logits(TOKENS))


def test_options_reach_the_store(in_ram, folder, tmp_path):
    copies = tmp_path / "copies"
    copies.mkdir()
    for shard in folder.glob("*.safetensors"):
        (copies / shard.name).write_bytes(shard.read_bytes())
    with with_share(in_ram, 0.2, stores=[copies], verify_reads=True) as model:
        store = experts_of(model).cache.store
        assert store.checksum(0) is not None
        assert model.generate(QUESTION, max_tokens=3, temperature=0.0).tokens
    with pytest.raises(CheckpointError, match="nowhere"):
        load(folder, stores=[tmp_path / "nowhere"])


@pytest.mark.slow
def test_routing_is_learned_and_recorded(in_ram, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with with_share(in_ram, 0.5, statistics=True, record_trace=tmp_path / "trace.npz") as model:
        prompt = len(model.template.render(QUESTION))
        answer = model.generate(QUESTION, max_tokens=8, temperature=0.0)
        seen = prompt + answer.stats.decoded_tokens
    trace = RoutingTrace.load(tmp_path / "trace.npz")
    assert (trace.tokens, trace.layers, trace.top_k) == (seen, 7, 6)
    with with_share(in_ram, 0.5, statistics=True) as model:
        experts = experts_of(model)
        statistics = RouterStatistics.open(ModelIdentity.of(folder))
        assert statistics.tokens == seen
        rows = model.engine.plan.rows - experts.cache.reserve
        hottest = statistics.order()[:rows]
        assert all(experts.cache.in_ram(key) for key in hottest)
        assert model.generate(QUESTION, max_tokens=8, temperature=0.0).tokens == answer.tokens


LEFT_OPEN = """
    import sys
    import moebox

    folder, ram, trace = sys.argv[1:]
    model = moebox.load(folder, ram=int(ram), context=1024, record_trace=trace)
    model.generate("Hello", max_tokens=3, temperature=0.0)
"""
DROPPED = """
    import gc

    del model
    gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [LEFT_OPEN, LEFT_OPEN + DROPPED], ids=["left open", "dropped"])
def test_the_end_of_the_program_saves_what_was_recorded(in_ram, folder, tmp_path, monkeypatch, script):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    arguments = [str(folder), str(budget(in_ram, 0.5)), str(tmp_path / "trace.npz")]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not result.stderr
    seen = RoutingTrace.load(tmp_path / "trace.npz").tokens
    assert seen > 2
    assert RouterStatistics.open(ModelIdentity.of(folder)).tokens == seen


def test_a_trace_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(RequestError, match="cannot be written"):
        load(folder, statistics=False, record_trace=tmp_path / "no" / "folder.npz")


def test_room_for_fewer_experts_than_a_layer_needs_is_refused(in_ram):
    least = budget(in_ram, 0)
    with pytest.raises(PlanError, match=r"12 of 448 experts .*the RAM budget is"):
        load(in_ram.engine.folder, context=CONTEXT, ram=least - 1)
    with load(in_ram.engine.folder, context=CONTEXT, ram=least, statistics=False) as model:
        assert model.engine.plan.rows == 12
        expected = in_ram.generate(QUESTION, max_tokens=4, temperature=0.0).tokens
        assert model.generate(QUESTION, max_tokens=4, temperature=0.0).tokens == expected


PEAK = """
    import json, sys
    from pathlib import Path
    import torch
    from moebox.runtime.engine.engine import Engine
    from moebox.runtime.engine.cpu_plan import budget_for_share
    from moebox.runtime.engine.cpu_runner import default_dtype
    from moebox.runtime.engine.options import LoadOptions
    from moebox.config import load_config

    torch.inference_mode(True)
    folder = Path(sys.argv[1])
    config = load_config(folder)
    ram = budget_for_share(config, default_dtype(config, "bf16"), "bf16", 2048, 0.5)
    engine = Engine.load(folder, LoadOptions(ram=ram, context=2048, statistics=False, threads=1))
    session = engine.session()
    ids = torch.randint(0, config.vocab_size, (1200,)).tolist()
    session.prefill(ids)
    for token in ids[:8]:
        session.decode(token)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    plan = engine.plan
    print(json.dumps({"peak": peak, "planned": plan.planned_bytes, "program": plan.program_bytes,
                      "ram": ram, "experts": plan.experts_bytes}))
"""


@pytest.mark.slow
def test_peak_memory_is_as_planned(tmp_path):
    """With half of 680 MB of experts in RAM, a prompt and some tokens take at most 5 % more than planned."""
    shape = {"hidden_size": 2048, "moe_intermediate_size": 1024, "intermediate_size": 4096}
    folder = synth(
        tmp_path / "model", "tiny", layers=4, experts=64, format="int4", config_overrides=shape
    ).folder
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(folder)], capture_output=True, text=True, check=True
    )
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["planned"] <= seen["ram"]
    assert seen["experts"] > 300e6
    assert seen["peak"] <= 1.05 * (seen["planned"] + seen["program"])
