"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over the compressed cache.

Shapes: T new tokens, S cached and new tokens, A heads, R kv_lora_rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.runtime.kv_cache import KVCache
from moebox.runtime.linear import Linear, softmax, widen
from moebox.runtime.norm import LATENT_EPS, RMSNorm
from moebox.runtime.rope import rotate

SCORES_BYTES = 128 << 20
"""Attention scores alive at once; longer prompts go through in blocks of queries."""


class Attention(nn.Module):
    """One layer's attention.

    A cached token is R + rope values, shared by all heads. Two forms give the same sums in another order:
    absorbed (queries are carried into the latent space: no work per cached token) for few new tokens,
    expanded (`kv_b_proj` turns latents into keys and values: 3.4 times less work per pair of tokens at K2's
    widths) for the chunks of a prefill.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.config = config
        self.layer = layer
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS, dtype)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS, dtype)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        per_pair_saved = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        per_key = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        self.expand_from = per_key // max(per_pair_saved, 1) + 1

    def forward(self, x: Tensor, rotations: Tensor, cache: KVCache) -> Tensor:
        """`x [T, H] -> [T, H]`; appends the new tokens' latents to the cache."""
        query = self._query(x, rotations)
        latent = cache.append(self.layer, self._compress(x, rotations))
        attend = self._absorbed if x.shape[0] < self.expand_from else self._expanded
        return self.o_proj(attend(query, latent).to(x.dtype).flatten(1))  # type: ignore[no-any-return]

    def _query(self, x: Tensor, rotations: Tensor) -> Tensor:
        """[T, A, nope + rope], rotated."""
        if self.config.q_lora_rank is None:
            flat = self.q_proj(x)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query: Tensor = flat.view(x.shape[0], self.config.num_attention_heads, -1)
        position_part = query[..., self.config.qk_nope_head_dim :]
        position_part.copy_(rotate(position_part, rotations))
        return query

    def _compress(self, x: Tensor, rotations: Tensor) -> Tensor:
        """What the cache keeps of `x`: [T, R + rope]."""
        rank, both = self.config.kv_lora_rank, self.kv_a_proj_with_mqa(x)
        key = rotate(both[:, None, rank:], rotations)[:, 0]
        return torch.cat([self.kv_a_layernorm(both[:, :rank]), key], dim=-1)

    def _kv_b(self) -> tuple[Tensor, Tensor]:
        """Per head the matrices to keys [A, nope, R] and to values [A, v, R]."""
        config = self.config
        per_head = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        return per_head[:, : config.qk_nope_head_dim], per_head[:, config.qk_nope_head_dim :]

    def _absorbed(self, query: Tensor, latent: Tensor) -> Tensor:
        """Attend in the latent space, all heads over the same keys: [T, A, v]."""
        config = self.config
        count, heads = query.shape[:2]
        to_key, to_value = self._kv_b()
        nope, rope = query[..., : config.qk_nope_head_dim], query[..., config.qk_nope_head_dim :]
        absorbed = torch.cat([torch.matmul(nope.transpose(0, 1), to_key).transpose(0, 1), rope], dim=-1)
        mixed = [
            self._mix(
                absorbed[begin:end].flatten(0, 1), latent[:seen], latent[:seen, : config.kv_lora_rank], mask
            )
            for begin, end, seen, mask in causal_blocks(count, latent.shape[0], heads)
        ]
        context = torch.cat(mixed).view(count, heads, config.kv_lora_rank).to(query.dtype)
        return torch.matmul(context.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)

    def _expanded(self, query: Tensor, latent: Tensor) -> Tensor:
        """Attend with each head's own keys and values, one head at a time: [T, A, v]."""
        config = self.config
        count, total = query.shape[0], latent.shape[0]
        compressed, rope_key = latent[:, : config.kv_lora_rank], latent[:, config.kv_lora_rank :]
        wide_latent, *matrices = widen(count, compressed, *self._kv_b())
        out = query.new_empty(count, config.num_attention_heads, config.v_head_dim)
        for head, (to_key, to_value) in enumerate(zip(*matrices, strict=True)):
            key = torch.cat([wide_latent @ to_key.T, rope_key.to(wide_latent.dtype)], dim=-1)
            value = wide_latent @ to_value.T
            for begin, end, seen, mask in causal_blocks(count, total, 1):
                out[begin:end, head] = self._mix(query[begin:end, head], key[:seen], value[:seen], mask)
        return out

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(query keys^T) values: queries [N, D], keys [S, D], values [S, V] -> [N, V]."""
        query, keys, values = widen(query.shape[0], query, keys, values)
        if mask is not None:  # heads of a token share its mask
            mask = mask.repeat_interleave(query.shape[0] // mask.shape[0], dim=0)
        weights = softmax(query @ keys.T, self.config.softmax_scale, mask)
        return weights.to(values.dtype) @ values


def causal_blocks(count: int, total: int, heads: int) -> list[tuple[int, int, int, Tensor | None]]:
    """Cut `count` new tokens, the last of `total`, into blocks whose scores fit `SCORES_BYTES`.

    Returns (begin, end, tokens that the block sees, mask bool [end - begin, seen] or None): True is hidden.
    """
    step = max(1, SCORES_BYTES // (4 * heads * total))
    past = total - count
    blocks = []
    for begin in range(0, count, step):
        end = min(begin + step, count)
        rows = torch.arange(past + begin, past + end)[:, None]
        mask = torch.arange(past + end) > rows if end - begin > 1 else None
        blocks.append((begin, end, past + end, mask))
    return blocks
