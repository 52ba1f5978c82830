"""Placements do not change answers: tiny-k2 with every placement equals the CPU runtime."""

import json

import pytest
import torch

from helpers.offload.gpu import DEVICES, PLACEMENTS, forced, need  # noqa: F401  # a fixture
from helpers.paths import ROOT
from moebox.offload.decode.host_step import FIELDS
from moebox.quantize.convert import quantize
from moebox.runtime.api import load
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model.compute import CPU
from moebox.runtime.model.router import choose_experts

CONTEXT = 512
PROMPT, DECODED = 40, 6
TOLERANCE = 1e-2
DEMO = json.loads((ROOT / "assets" / "demo.json").read_text())
GREEDY: dict = {"temperature": 0.0, "max_tokens": 24, "thinking": False}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-k2") / "int4"
    quantize(ROOT / "assets" / "tiny-k2", folder)
    return folder


@pytest.fixture(scope="module")
def cpu_model(folder):
    with load(folder, device="cpu", dtype=torch.float32, context=CONTEXT) as model:
        yield model


@pytest.fixture(scope="module")
def tokens(cpu_model):
    text = (ROOT / "assets" / "tiny-k2" / "README.md").read_text()
    return cpu_model.tokenizer.encode(text)[: PROMPT + DECODED]


@pytest.fixture(scope="module")
def expected(cpu_model, tokens):
    """The CPU runtime's logits, and its picks in each MoE layer."""
    chosen = []

    def record(logits, bias, config):
        ids, weights = choose_experts(logits, bias, config)
        chosen.append(ids)
        return ids, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPU, "route", record)
        logits = cpu_model.logits(tokens)
    return logits, chosen


@pytest.fixture(scope="module")
def greedy_tokens(cpu_model):
    return cpu_model.generate(DEMO["messages"], tools=DEMO["tools"], **GREEDY).tokens


@pytest.fixture
def routed(cpu_model, expected):
    return cpu_model.engine.config, expected[1]


def check_roads(name, stats):
    hits, uploads, cpu, cold = (
        int(stats[:, FIELDS.index(field)].sum()) for field in ("hits", "uploads", "cpu", "cold")
    )
    assert hits + uploads + cpu + cold == 7 * 6
    assert not cold or name.startswith("cold")
    if name == "all-cpu":
        assert cpu == 7 * 6
    elif name == "all-gpu":
        assert not cpu or uploads
    elif name == "thrashing":
        assert cpu
        assert hits < 7 * 6


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_logits(folder, cpu_model, tokens, expected, forced, device, name):  # noqa: F811
    budgets = PLACEMENTS[name].budgets(cpu_model.engine.config, CONTEXT)
    engine = Engine.load(folder, LoadOptions(device=need(device), context=CONTEXT, **budgets))
    assert engine.plan.exclusive == (name == "exclusive" or name.startswith("cold"))
    assert (engine.plan.cold > 0) == (engine.runner.experts.cold is not None) == name.startswith("cold")
    logits, _ = expected
    assert relative(engine.logits(tokens), logits) <= TOLERANCE
    engine.runner.chunk_tokens = PROMPT // 2 + 1  # the second chunk attends to the first one's cache
    forced[0].start(0)
    session = engine.session()
    # Over all tokens, since bf16 alone may be off by more at a single position (1.2 % at some).
    found = [session.prefill(tokens[:PROMPT])]
    for position in range(PROMPT, len(tokens)):
        forced[0].start(position)
        found.append(session.decode(tokens[position]))
        check_roads(name, engine.runner.experts.decode_host.stats)
    assert relative(torch.stack(found), logits[PROMPT - 1 :]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_greedy_text(folder, cpu_model, greedy_tokens, device, name):
    budgets = PLACEMENTS[name].budgets(cpu_model.engine.config, CONTEXT)
    with load(folder, device=need(device), context=CONTEXT, **budgets) as model:
        answer = model.generate(DEMO["messages"], tools=DEMO["tools"], **GREEDY)
        assert "FindRestaurants" in model.tokenizer.decode(answer.tokens)
        assert answer.tokens == greedy_tokens


@pytest.mark.parametrize("device", DEVICES)
def test_one_token_through_either_path(folder, tokens, device):
    """Decoding with the captured program agrees with a prefill of one token."""
    engine = Engine.load(folder, LoadOptions(device=need(device), context=CONTEXT))
    session = engine.session()
    session.prefill(tokens[:PROMPT])
    by_program = session.decode(tokens[PROMPT])
    again = engine.session(CONTEXT - 1)
    again.prefill(tokens[:PROMPT])
    with torch.inference_mode():
        hidden = engine.runner.model([tokens[PROMPT]], again._cache)
        by_modules = engine.runner.model.logits(hidden)[0].cpu()
    assert relative(by_program, by_modules) <= 5 * TOLERANCE  # nearly equal scores may be picked differently
