"""Logits equal transformers' DeepseekV3ForCausalLM in fp32, over the variants of the family."""

import pytest
import torch

from helpers.runtime import load_tensors, make_checkpoint, reference_logits, reference_model, rewrite
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model import linear
from moebox.runtime.model.compute import CPU

YARN = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 128}
VARIANTS = {
    "kimi-k2": {"rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}},
    "kimi-k2.5": {
        "rope_scaling": YARN | {"factor": 64.0, "beta_fast": 32.0, "beta_slow": 1.0},
        "rms_norm_eps": 1e-5,
    },
    "moonlight": {
        "q_lora_rank": None,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
    },
    "deepseek-v3": {
        "num_hidden_layers": 4,
        "first_k_dense_replace": 2,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "rope_theta": 10000.0,
        "rope_scaling": YARN | {"factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0},
        "routed_scaling_factor": 2.5,
    },
    # Large enough to change the result if the latent norms used it.
    "large-eps": {"rms_norm_eps": 0.1},
    "plain-topk": {"norm_topk_prob": False, "rope_scaling": None},
    "mscale": {"rope_scaling": YARN | {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5}},
}
TOKENS = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(1)).tolist()
TOLERANCE = 1e-4


def largest_difference(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request, tmp_path_factory):
    """An fp32 engine and transformers' logits of 200 tokens, 72 of them beyond YaRN's original context."""
    folder = make_checkpoint(tmp_path_factory.mktemp("golden") / "model", **VARIANTS[request.param])
    expected = reference_logits(folder, TOKENS)
    assert expected.std() > 0.5
    return Engine.load(folder, LoadOptions(dtype=torch.float32)), expected


@pytest.mark.slow
def test_one_forward(golden):
    engine, expected = golden
    logits = engine.logits(TOKENS)
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert largest_difference(logits, expected) <= TOLERANCE


def test_prefill_then_decode(golden):
    engine, expected = golden
    session = engine.session()
    assert largest_difference(session.prefill(TOKENS[:150]), expected[149]) <= TOLERANCE
    for position in range(150, 170):
        assert largest_difference(session.decode(TOKENS[position]), expected[position]) <= TOLERANCE


@pytest.mark.slow
def test_token_by_token(golden):
    engine, expected = golden
    session = engine.session()
    logits = [session.prefill(TOKENS[:1])] + [session.decode(token) for token in TOKENS[1:60]]
    assert largest_difference(torch.stack(logits), expected[:60]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 70])  # attention expands keys and values for the larger one only
def test_chunks_and_small_blocks(golden, monkeypatch, chunk):
    loaded, expected = golden
    monkeypatch.setattr(loaded.runner, "chunk_tokens", chunk)
    monkeypatch.setattr(CPU, "scores_bytes", 8000)
    assert largest_difference(loaded.logits(TOKENS), expected) <= TOLERANCE


def test_prefix_reuse(golden):
    engine, expected = golden
    session = engine.session()
    session.prefill(TOKENS[:90])
    session.prefill([*TOKENS[:60], 5, 6, 7])
    assert (session.reused, session.computed) == (60, 3)
    assert largest_difference(session.prefill(TOKENS), expected[-1]) <= TOLERANCE
    assert (session.reused, session.computed) == (60, 140)


def test_groups_where_scores_are_negative(tmp_path):
    """Experts outside the chosen groups get -inf, not 0, which would be above negative scores."""
    folder = make_checkpoint(tmp_path / "model", **VARIANTS["deepseek-v3"])
    for name, bias in load_tensors(folder).items():
        if name.endswith("e_score_correction_bias"):
            rewrite(folder, name, bias - 1.5)
    logits = Engine.load(folder, LoadOptions(dtype=torch.float32)).logits(TOKENS)
    assert largest_difference(logits, reference_logits(folder, TOKENS)) <= TOLERANCE


def test_attention_forms_agree(tmp_path):
    """Absorbed and expanded attention give the same result."""
    folder = make_checkpoint(tmp_path / "model")
    loaded = Engine.load(folder, LoadOptions(dtype=torch.float32))
    logits = []
    for threshold in (1, 10_000):
        for layer in loaded.runner.model.model.layers:
            layer.self_attn.expand_from = threshold
        logits.append(loaded.logits(TOKENS))
    assert largest_difference(*logits) <= 2e-5


@pytest.mark.parametrize("native", [True, False])
def test_bf16_stays_close(tmp_path, monkeypatch, native):
    """With every expert chosen routing cannot flip, and bf16 is off by rounding: less than transformers.

    How bf16 products round depends on the CPU: 2.0 % with AMX, 1.7 % without BF16, transformers 3.3 %.
    """
    monkeypatch.setattr(linear, "native_bf16", lambda: native)
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=4)
    expected = reference_logits(folder, TOKENS)
    loaded = Engine.load(folder, LoadOptions(dtype=torch.bfloat16))
    session = loaded.session()
    last = session.prefill(TOKENS[:-1]), session.decode(TOKENS[-1])
    with torch.inference_mode():
        theirs = reference_model(folder).bfloat16()(torch.tensor([TOKENS])).logits[0].float()
    assert (loaded.logits(TOKENS) - expected).norm() <= 0.8 * (theirs - expected).norm()
    assert (torch.stack(last) - expected[-2:]).norm() <= 3e-2 * expected[-2:].norm()


def test_kimi_k25_layout(tmp_path):
    """Text tensors have the prefix `language_model.`; vision tensors are not loaded."""
    folder = make_checkpoint(tmp_path / "model", model_type="kimi_k25")
    logits = Engine.load(folder, LoadOptions(dtype=torch.float32)).logits(TOKENS)
    assert largest_difference(logits, reference_logits(folder, TOKENS)) <= TOLERANCE
