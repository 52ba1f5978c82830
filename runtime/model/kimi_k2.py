"""The Kimi K2 family (DeepSeek-V3 architecture): modules under Hugging Face's tensor names.

Shapes: T tokens, H hidden_size. Matrices are multiplied in the model's dtype; the residual stream, softmax,
router, norms and the sum over experts are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.offload.experts import Experts
from moebox.runtime.model.attention import Attention
from moebox.runtime.model.base import Processor
from moebox.runtime.model.compute import CPU
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.linear import Linear
from moebox.runtime.model.mlp import MLP, MoE, joined
from moebox.runtime.model.norm import RMSNorm
from moebox.runtime.model.rope import Rotary

PACKED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "q_kv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Modules whose weight stacks the rows of several weights of the checkpoint."""


class DecoderLayer(nn.Module):
    """Attention, then the dense MLP or the mixture of experts; each adds to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, processor: Processor) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype, processor.device)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, dtype, processor)
        self.post_attention_layernorm = norm()
        self.mlp = (
            MoE(config, layer, processor)
            if layer in config.moe_layers
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(self, hidden: Tensor, rotations: Sequence[Tensor], cache: KVCache) -> Tensor:
        """`hidden` fp32 [T, H] -> fp32 [T, H], in place; `rotations` has one entry for each part."""
        parts, written = torch.split(hidden, [len(part) for part in rotations]), 0
        for part, turns in zip(parts, rotations, strict=True):
            part.add_(self.self_attn(self.input_layernorm(part), turns, cache, written))
            written += len(part)
        if isinstance(self.mlp, MoE):
            return hidden.add_(self.mlp([self.post_attention_layernorm(part) for part in parts]))
        for part in parts:
            part.add_(self.mlp(self.post_attention_layernorm(part)))
        return hidden


class Decoder(nn.Module):
    """Embedding, layers and final norm: the tensors under `model.` in a checkpoint."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, processor: Processor) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, dtype, processor) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, processor.device)
        self.rotary = Rotary(config, processor.device)


class KimiK2(nn.Module):
    """The whole model: token ids in, logits out.

    `connect` says what computes the routed experts, and comes before the first pass; the `processor`
    computes everything else.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, processor: Processor = CPU) -> None:
        super().__init__()
        self.config = config
        self.processor = processor
        self.model = Decoder(config, dtype, processor)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(
        self, token_ids: list[int], cache: KVCache, between_layers: Callable[[], None] | None = None
    ) -> Tensor:
        """Run the tokens that follow those in the cache, and commit them to it.

        Args:
            token_ids: T ids.
            cache: grows by T tokens when the pass has finished, and not before.
            between_layers: called before each layer; an exception that it raises ends the pass.

        Returns:
            The hidden states after the final norm, [T, H]: the input of `logits`.
        """
        hidden = self.model.embed_tokens(torch.tensor(token_ids, device=self.processor.device)).float()
        rotations, start = [], len(cache)
        for part in torch.split(hidden, self.processor.part_tokens):
            rotations.append(self.model.rotary.rotations(start, len(part)))
            start += len(part)
        for layer in self.model.layers:
            if between_layers is not None:
                between_layers()
            hidden = layer(hidden, rotations, cache)
        normed = joined([self.model.norm(part) for part in torch.split(hidden, self.processor.part_tokens)])
        cache.commit(token_ids)
        return normed

    @property
    def experts(self) -> Experts:
        """What computes the routed experts of all layers."""
        return next(layer.mlp.experts for layer in self.model.layers if isinstance(layer.mlp, MoE))

    def connect(self, experts: Experts) -> None:
        """Let `experts` compute the routed experts of all layers."""
        for layer in self.model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.experts = experts

    def sources(self, parameter: str) -> list[str]:
        """Names, without prefix, of the checkpoint's tensors whose rows a parameter stacks."""
        module, _, attribute = parameter.rpartition(".")
        parent, _, name = module.rpartition(".")
        parts: tuple[str, ...] = PACKED.get(name, (name,))
        if self.config.q_lora_rank is None:
            parts = tuple(part.replace("q_a_proj", "q_proj") for part in parts)
        return [f"{parent}.{part}.{attribute}".removeprefix(".") for part in parts]

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [T, H]` -> fp32 [T, vocab]."""
        return self.lm_head(hidden).float()
