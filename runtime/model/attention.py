"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over the compressed cache.

Shapes: T new tokens, S cached and new tokens, A heads, R kv_lora_rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.linear import Linear, bmm, widen
from moebox.runtime.model.norm import LATENT_EPS, RMSNorm
from moebox.runtime.model.rope import rotate

if TYPE_CHECKING:
    from moebox.runtime.model.base import Processor


class Attention(nn.Module):
    """One layer's attention.

    A cached token takes R + rope values, which all heads share. Two forms compute the same sums in another
    order:

    - absorbed, for few new tokens: `kv_b_proj` maps the queries into the latent space; cached tokens need no
      projection;
    - expanded, for a prefill's chunks: `kv_b_proj` maps the latents to keys and values; a pair of tokens then
      takes 3.4 times fewer operations at K2's widths.

    `q_kv_a_proj` holds the rows of `q_a_proj` (without a query rank, of `q_proj`), then those of
    `kv_a_proj_with_mqa`.

    Attributes:
        expand_from: new tokens from which the expanded form takes fewer operations.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, processor: Processor) -> None:
        super().__init__()
        heads, hidden = config.num_attention_heads, config.hidden_size
        self.config = config
        self.layer = layer
        self.processor = processor
        self.query_rows = config.q_lora_rank or heads * config.qk_head_dim
        self.q_kv_a_proj = Linear(hidden, self.query_rows + config.kv_lora_rank + config.qk_rope_head_dim)
        if config.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS, dtype, processor.device)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS, dtype, processor.device)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        per_pair_saved = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        per_key = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        self.expand_from = per_key // max(per_pair_saved, 1) + 1

    def forward(self, x: Tensor, rotations: Tensor, cache: KVCache, written: int = 0) -> Tensor:
        """`x [T, H] -> [T, H]`.

        The tokens' latents are appended to the cache, behind the `written` tokens that the same pass appended
        before.
        """
        rank, nope = self.config.kv_lora_rank, self.config.qk_nope_head_dim
        both = self.q_kv_a_proj(x)
        query, compressed = self._query(both[:, : self.query_rows]), both[:, self.query_rows :]
        positional = rotate(torch.cat([query[..., nope:], compressed[:, None, rank:]], dim=1), rotations)
        entry = torch.cat([self.kv_a_layernorm(compressed[:, :rank]), positional[:, -1]], dim=-1)
        latent = cache.append(self.layer, entry, written)
        attend = self._absorbed if x.shape[0] < self.expand_from else self._expanded
        mixed = attend(query[..., :nope].transpose(0, 1), positional[:, :-1].transpose(0, 1), latent)
        return self.o_proj(mixed.transpose(0, 1).type(x.dtype).flatten(1))

    def _query(self, projected: Tensor) -> Tensor:
        """Output of the first projection, [T, query_rows] -> queries [T, A, nope + rope], not yet rotated."""
        if self.config.q_lora_rank is not None:
            projected = self.q_b_proj(self.q_a_layernorm(projected))
        return projected.reshape(len(projected), self.config.num_attention_heads, -1)

    def per_head(self) -> Tensor:
        """`kv_b_proj` as [A, nope + v, R]: for each head the rows of its keys, then those of its values."""
        return self.kv_b_proj.weight.view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)

    def _absorbed(self, query: Tensor, position: Tensor, latent: Tensor) -> Tensor:
        """Attend in the latent space, where all heads share the keys.

        `query [A, T, nope]`, `position [A, T, rope]`, `latent [S, R + rope]` -> [A, T, v].
        """
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        per_head = self.per_head()
        query = torch.cat([bmm(query, per_head[:, :nope]), position], dim=-1)
        latent = widen(query.shape[0] * query.shape[1], latent)
        scale, at_once = self.config.softmax_scale, self.processor.scores_bytes
        mixed = causal_attention(query, latent, latent[:, :rank], scale, at_once)
        return bmm(mixed, per_head[:, nope:].transpose(1, 2))

    def _expanded(self, query: Tensor, position: Tensor, latent: Tensor) -> Tensor:
        """Attend with each head's own keys and values, a few heads at a time; shapes as `_absorbed`."""
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        heads, count, _ = query.shape
        width = 3 * self.config.qk_head_dim + self.config.v_head_dim  # of keys and values, then padded ones
        size = self.processor.heads_at_once(count, latent.shape[0], width)
        query, latent = torch.cat([query, position], dim=-1), widen(count, latent)
        mixed = []
        for group in (slice(start, start + size) for start in range(0, heads, size)):
            per_head = widen(count, self.per_head()[group])
            both = latent[:, :rank].type(per_head.dtype) @ per_head.transpose(1, 2)
            shared = latent[:, rank:].expand(both.shape[0], -1, -1)
            keys = torch.cat([both[..., :nope], shared.type(both.dtype)], dim=-1)
            queries = query[group].type(keys.dtype)
            mixed.append(self.processor.attend(queries, keys, both[..., nope:], self.config.softmax_scale))
        return torch.cat(mixed)


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, scores_bytes: int) -> Tensor:
    """Causal softmax(scale * query keys^T) values, where the T queries belong to the last of the S tokens.

    `query [A, T, D]`, `keys [..., S, D]`, `values [..., S, V]`, with or without heads -> [A, T, V]. The fp32
    scores of the queries that are taken at once fit `scores_bytes`.
    """
    heads, count, _ = query.shape
    total = keys.shape[-2]
    step = max(1, scores_bytes // (4 * heads * total))
    query = query.type(keys.dtype)
    mixed = []
    for start in range(0, count, step):
        end = min(start + step, count)
        seen = total - count + end
        scores = (query[:, start:end] @ keys[..., :seen, :].mT).float().mul_(scale)
        mixed.append(causal_softmax(scores).type(values.dtype) @ values[..., :seen, :])
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax of fp32 scores [..., T, S] over S; row t leaves out the last T - 1 - t columns."""
    count = scores.shape[-2]
    if count > 1:
        hidden = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., -count:].masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1)
