"""The K2 architecture for training, with Hugging Face's tensor names (experts stacked per layer).

T tokens of all documents of a batch, one after another; H hidden_size; E n_routed_experts;
I moe_intermediate_size; A num_attention_heads; k num_experts_per_tok. The equations are those of
transformers' DeepseekV3ForCausalLM.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def read_config(path: Path, **changes: Any) -> SimpleNamespace:
    """`config.json` as attributes; `changes` replace some."""
    return SimpleNamespace(**json.loads(path.read_text()) | changes)


@dataclass
class Documents:
    """Where each document of a flat batch starts, and the position of each token in its document."""

    starts: Tensor
    """int32 [documents + 1]; ends with T. Empty documents are allowed."""
    positions: Tensor
    """int64 [T]: each token's place in its document."""
    longest: int

    @classmethod
    def of(cls, starts: Tensor, longest: int | None = None, total: int | None = None) -> "Documents":
        """`longest` and `total`, where the caller knows them, save a synchronization with the device."""
        lengths = starts.diff().long()
        first = torch.repeat_interleave(starts[:-1].long(), lengths, output_size=total)
        positions = torch.arange(len(first), device=starts.device) - first
        return cls(starts, positions, longest or int(lengths.max()))

    def mask(self) -> Tensor:
        """bool [T, T]: causal, within a document."""
        same = torch.arange(len(self.positions), device=self.positions.device) - self.positions
        return (same[:, None] == same[None, :]).tril()


def linear(rows_in: int, rows_out: int) -> nn.Linear:
    return nn.Linear(rows_in, rows_out, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Rope(nn.Module):
    """YaRN's rotary frequencies and the softmax scale that goes with them."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
        factor, original = yarn["factor"], yarn["original_max_position_embeddings"]
        plain = base ** -(torch.arange(0, dim, 2).double() / dim)
        low, high = (dim * math.log(original / (2 * math.pi * yarn[beta])) / (2 * math.log(base))
                     for beta in ("beta_fast", "beta_slow"))  # fmt: skip
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((torch.arange(dim // 2).double() - low) / max(high - low, 0.001)).clamp(0, 1)
        angles = torch.outer(torch.arange(config.max_position_embeddings).double(),
                             plain / factor * ramp + plain * (1 - ramp))  # fmt: skip
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        mscale = 0.1 * yarn["mscale_all_dim"] * math.log(factor) + 1
        self.scale = mscale**2 / math.sqrt(config.qk_nope_head_dim + dim)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate pairs (x[2j], x[2j+1]) of [T, heads, dim]."""
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        even, odd = x[..., 0::2].float(), x[..., 1::2].float()
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """Causal attention within documents; query, key and value are [T, A, dim]."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        starts, longest = documents.starts, documents.longest
        return varlen_attn(query, key, value, starts, starts, longest, longest,
                           scale=scale, window_size=(-1, 0))  # fmt: skip
    heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=documents.mask(), scale=scale)
    return out[0].transpose(0, 1)


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.nope, self.rope_dim = (
            config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim)  # fmt: skip
        self.latent, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self.q_a_proj = linear(config.hidden_size, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank)
        self.q_b_proj = linear(config.q_lora_rank, self.heads * (self.nope + self.rope_dim))
        self.kv_a_proj_with_mqa = linear(config.hidden_size, self.latent + self.rope_dim)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = linear(self.latent, self.heads * (self.nope + self.value_dim))
        self.o_proj = linear(self.heads * self.value_dim, config.hidden_size)

    def forward(self, x: Tensor, rope: Rope, documents: Documents) -> Tensor:
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.heads, -1))
        latent, key_rope = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope_dim], -1)
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1))
        key, value = key_value.split([self.nope, self.value_dim], -1)
        query, query_rope = query.split([self.nope, self.rope_dim], -1)
        query_rope = rope(query_rope, documents.positions)
        key_rope = rope(key_rope[:, None], documents.positions).expand(-1, self.heads, -1)
        query, key = torch.cat([query, query_rope], -1), torch.cat([key, key_rope], -1)
        return self.o_proj(attend(query, key, value.contiguous(), documents, rope.scale).flatten(1))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Sigmoid scores; the correction bias changes which experts are chosen, not their weights."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.top_k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> weights float32 [T, k] and expert ids [T, k]."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.top_k, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling, chosen


class Experts(nn.Module):
    """All routed experts of a layer: tokens are sorted by expert, then three grouped products."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the chosen experts, [T, H], and the tokens of each expert, int64 [E]."""
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort()
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        load = torch.zeros(len(self.gate_proj), dtype=torch.int64, device=x.device)
        load = load.scatter_add(0, chosen.flatten(), torch.ones_like(order))
        rows = x.bfloat16() if x.is_cuda else x
        rows = Permute.apply(rows[:, None].expand(-1, top_k, -1).flatten(0, 1), order, place)
        inner = F.silu(grouped(rows, self.gate_proj, load)) * grouped(rows, self.up_proj, load)
        out = Permute.apply(grouped(inner, self.down_proj, load), place, order)
        return (out.unflatten(0, (-1, top_k)) * weights[..., None]).sum(1).to(x.dtype), load


class Permute(torch.autograd.Function):
    """rows[order]. Its gradient is grad[inverse], where autograd would scatter with atomic additions."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.saved_tensors[0]], None, None


def grouped(rows: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """rows [n, in], sorted by expert, times weight[e].T of their own expert; weight is [E, out, in]."""
    if rows.is_cuda:
        weight = weight.to(torch.bfloat16).transpose(1, 2)
        return F.grouped_mm(rows, weight, offs=load.cumsum(0, dtype=torch.int32))
    parts = rows.split(load.tolist())
    return torch.cat([part @ matrix.T.to(part.dtype) for part, matrix in zip(parts, weight, strict=True)])


class MoE(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.register_buffer(
            "load", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        out, load = self.experts(x, *self.gate(x))
        if self.training:
            self.load += load
        return out + self.shared_experts(x)


class Block(nn.Module):
    def __init__(self, config: SimpleNamespace, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.dropout = nn.Dropout(getattr(config, "dropout", 0.0))

    def forward(self, x: Tensor, rope: Rope, documents: Documents) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, documents))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Backbone(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.rope, documents)
        return self.norm(x)


class Model(nn.Module):
    """`tokens` int64 [T] -> logits [T, vocab]."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        return self.lm_head(self.model(tokens, documents))

    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MoE)]


def _initialise(module: nn.Module) -> None:
    """Normal with std in^-0.5 for matrices, 0.1 for embeddings."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() > 1:
            std = 0.1 if isinstance(module, nn.Embedding) else parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=std)
