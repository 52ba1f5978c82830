"""The plain torch operations against the CPU runtime's modules, in fp32."""

from __future__ import annotations

import threading

import pytest
import torch

from moebox.config import ModelConfig
from moebox.kernels.gpu.ops import load_ops
from moebox.kernels.gpu.reference import ops as reference
from moebox.runtime.model.attention import Attention
from moebox.runtime.model.compute import CPU
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.mlp import MLP
from moebox.runtime.model.norm import RMSNorm
from moebox.runtime.model.rope import Rotary
from moebox.runtime.model.router import Router


def config(**overrides: object) -> ModelConfig:
    """A small model with no even widths."""
    values: dict[str, object] = {
        "model_type": "kimi_k2",
        "vocab_size": 97,
        "hidden_size": 96,
        "intermediate_size": 112,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "n_routed_experts": 15,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 12,
        "v_head_dim": 20,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 56,
    }
    return ModelConfig(**(values | overrides))


def randomize(module: torch.nn.Module) -> None:
    """Weights that keep outputs near 1."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        parameter.requires_grad_(False)


@pytest.mark.parametrize("q_lora_rank", [56, None])
@pytest.mark.parametrize("n_tokens", [1, 9])
def test_attention(q_lora_rank, n_tokens):
    """The operations, called in order for each token, give the result of the module's forward."""
    model = config(q_lora_rank=q_lora_rank)
    module = Attention(model, 0, torch.float32, CPU)
    randomize(module)
    rotary = Rotary(model, CPU.device)
    xs = torch.randn(n_tokens, model.hidden_size)
    expected = module(xs, rotary.rotations(0, n_tokens), KVCache(model, torch.float32, 64))
    table = torch.view_as_real(rotary.rotations(0, 64)).permute(2, 0, 1).contiguous()
    cache = torch.full((64, 52), torch.nan)
    for index, x in enumerate(xs):
        out = attend(module, x, table, torch.tensor([index]), cache)
        torch.testing.assert_close(out, expected[index], rtol=1e-4, atol=1e-5)


def attend(module, x, table, position, cache):
    """One token's attention by the operations alone."""
    q_norm = module.q_a_layernorm.weight if module.config.q_lora_rank else None
    both = reference.gemv(x, module.q_kv_a_proj.weight)
    query = reference.latents(both, q_norm, module.kv_a_layernorm.weight, table, position, cache)
    if q_norm is not None:
        query = reference.gemv(query, module.q_b_proj.weight)
    query = reference.absorb(query, module.per_head(), table, position)
    mixed = reference.mla_decode(query, cache, position, module.config.softmax_scale, 40)
    return reference.gemv(reference.value_up(mixed, module.per_head(), 20), module.o_proj.weight)


def test_combine_norm():
    model = RMSNorm(96, 1e-5, torch.float32, torch.device("cpu"))
    randomize(model)
    x, terms = torch.randn(96), [torch.randn(96), torch.randn(96).bfloat16()]
    total = x + terms[0] + terms[1]
    y = reference.combine_norm(x, terms, model.weight, 1e-5, torch.float32)
    assert torch.equal(x, total)
    torch.testing.assert_close(y, model(total[None])[0])


def test_mlp():
    module = MLP(96, 112)
    randomize(module)
    x = torch.randn(96)
    inner = reference.silu_mul(reference.gemv(x, module.gate_up_proj.weight))
    torch.testing.assert_close(reference.gemv(inner, module.down_proj.weight), module(x[None])[0])


def test_gemv_sums_in_fp32():
    """The number of rows is no multiple of the block that is converted at a time."""
    x, w = torch.randn(5000).bfloat16(), torch.randn(431, 5000).bfloat16()
    expected = w.double() @ x.double()
    out = reference.gemv(x, w, torch.float32)
    assert (out - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("groups", [{}, {"n_group": 5, "topk_group": 3}, {"n_group": 3, "topk_group": 1}])
@pytest.mark.parametrize("norm", [True, False])
def test_route(groups, norm):
    model = config(norm_topk_prob=norm, **groups)
    router = Router(model, CPU)
    randomize(router)
    x = torch.randn(50, 96)
    ids, weights = router(x)
    logits = x @ router.weight.T
    ours, our_weights = reference.route(logits, router.e_score_correction_bias, model)
    assert torch.equal(ours.sort(dim=1).values, ids.sort(dim=1).values)
    torch.testing.assert_close(our_weights.gather(1, ours.argsort(1)), weights.gather(1, ids.argsort(1)))


def test_post_raises_the_flag_last():
    """A reader that sees the flag sees the whole mailbox."""
    ids, weights = torch.arange(4, dtype=torch.int32), torch.rand(4)
    hidden, flag = torch.randn(96).bfloat16(), torch.zeros(16, dtype=torch.int32)
    mailbox = torch.zeros(4, dtype=torch.int32), torch.zeros(4), torch.zeros(96).bfloat16()
    seen = []

    def read() -> None:
        load_ops(torch.device("cpu")).wait(flag)
        seen.extend(array.clone() for array in mailbox)

    reader = threading.Thread(target=read)
    reader.start()
    reference.post(ids, weights, hidden, *mailbox, flag)
    reader.join(30)
    assert [torch.equal(a, b) for a, b in zip(seen, (ids, weights, hidden), strict=True)] == [True] * 3
