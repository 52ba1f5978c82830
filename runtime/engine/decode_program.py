"""The GPU's side of one decoded token: the operations of all layers, in order.

They are captured once into a CUDA graph; the stand-in device calls them each time. What a layer needs from
the host (the slots of its experts, the CPU's sum) it finds in the mailbox of `offload/decode/`, behind a flag
that it waits for.

Shapes: H hidden_size, A heads, R kv_lora_rank, P qk_rope_head_dim, C cache capacity, k experts a token, L
MoE layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.kernels.gpu.base import Ops
from moebox.offload.decode.mailbox import Mailbox
from moebox.runtime.model.attention import Attention
from moebox.runtime.model.kimi_k2 import DecoderLayer, KimiK2
from moebox.runtime.model.mlp import MLP, MoE
from moebox.runtime.model.norm import LATENT_EPS
from moebox.runtime.model.router import Router


class DecodeProgram:
    """One token through the model, for one cache's memory.

    Before a run the host writes `token` and `position`; after it `logits` holds what follows the token, and
    the cache its entry in row `position`.

    Args:
        model: backbone on the device, bf16.
        ops: the device's operations.
        box: the mailbox; its row i belongs to the i-th MoE layer.
        slab: uint8 [slots, stride], the experts on the device.
        ram: uint8 [rows, stride], the experts in RAM, pinned.
        rotations: fp32 [2, C, P / 2] on the device.
        layers: the cache, bf16 [C, R + P] a layer.
        inputs: int64 [2], pinned: token and position.
        logits: fp32 [vocab_size], pinned.
        predicts: at each MoE layer, predict the experts of the next one, too.
    """

    def __init__(
        self,
        model: KimiK2,
        ops: Ops,
        box: Mailbox,
        slab: Tensor,
        ram: Tensor,
        rotations: Tensor,
        layers: list[Tensor],
        inputs: Tensor,
        logits: Tensor,
        predicts: bool = False,
    ) -> None:
        config = model.config
        self._model = model
        self._ops = ops
        self._box = box
        self._slab = slab
        self._ram = ram
        self._rotations = rotations
        self._layers = layers
        self._inputs = inputs
        self._logits = logits
        self._device_inputs = torch.empty_like(inputs, device=slab.device)
        self._expert_shape = (config.hidden_size, config.moe_intermediate_size)
        self._from_residents = torch.empty(config.hidden_size, dtype=torch.float32, device=slab.device)
        self._from_uploads = torch.empty_like(self._from_residents)
        gates = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
        self._next_gates = [*gates[1:], None] if predicts else [None] * len(gates)

    @torch.inference_mode()
    def __call__(self) -> None:
        """Issue the token's operations in order."""
        ops, decoder = self._ops, self._model.model
        self._device_inputs.copy_(self._inputs, non_blocking=True)
        token, position = self._device_inputs[:1], self._device_inputs[1:]
        x = decoder.embed_tokens.weight.index_select(0, token)[0].float()
        terms: list[Tensor] = []
        for layer, cache in zip(decoder.layers, self._layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            terms = self._layer(layer, x, terms, cache, position)
        last = ops.combine_norm(x, terms, decoder.norm.weight, decoder.norm.eps)
        self._logits.copy_(ops.gemv(last, self._model.lm_head.weight, torch.float32), non_blocking=True)

    def _layer(
        self, layer: DecoderLayer, x: Tensor, terms: list[Tensor], cache: Tensor, position: Tensor
    ) -> list[Tensor]:
        """Add `terms` of the layer before to the residual `x`; returns this layer's, not yet added."""
        norm = layer.input_layernorm
        y = self._ops.combine_norm(x, terms, norm.weight, norm.eps)
        attended = self._attention(layer.self_attn, y, cache, position)
        norm = layer.post_attention_layernorm
        y = self._ops.combine_norm(x, [attended], norm.weight, norm.eps)
        return self._moe(layer.mlp, y) if isinstance(layer.mlp, MoE) else [self._mlp(layer.mlp, y)]

    def _attention(self, module: Attention, y: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        """`y` bf16 [H] -> fp32 [H], in absorbed form."""
        ops, config = self._ops, module.config
        q_kv = ops.gemv(y, module.q_kv_a_proj.weight)
        ranked = config.q_lora_rank is not None
        q_weight = module.q_a_layernorm.weight if ranked else None
        kv_weight = module.kv_a_layernorm.weight
        query = ops.latents(q_kv, q_weight, kv_weight, self._rotations, position, cache, LATENT_EPS)
        if ranked:
            query = ops.gemv(query, module.q_b_proj.weight)
        per_head = module.per_head()
        query = ops.absorb(query, per_head, self._rotations, position)
        mixed = ops.mla_decode(query, cache, position, config.softmax_scale, config.kv_lora_rank)
        values = ops.value_up(mixed, per_head, config.v_head_dim)
        return ops.gemv(values, module.o_proj.weight, torch.float32)

    def _mlp(self, module: MLP, y: Tensor) -> Tensor:
        """`y` bf16 [H] -> fp32 [H]."""
        inner = self._ops.silu_mul(self._ops.gemv(y, module.gate_up_proj.weight))
        return self._ops.gemv(inner, module.down_proj.weight, torch.float32)

    def _moe(self, module: MoE, y: Tensor) -> list[Tensor]:
        """The mixture's terms: shared expert, experts on the GPU, uploaded ones, and the CPU's sum.

        The resident experts' sum includes the GPU's share of the split expert.
        """
        ops, box, gate = self._ops, self._box, module.gate
        row = module.layer - gate.config.first_k_dense_replace
        ops.route_and_post(
            ops.gemv(y, gate.weight, torch.float32),
            gate.e_score_correction_bias,
            gate.config,
            y,
            box.ids[row],
            box.weights[row],
            box.hidden[row],
            box.routed[row],
        )
        shared = [self._mlp(module.shared_experts, y)] if module.shared_experts is not None else []
        ops.wait(box.listed[row])
        self._experts(box.resident_slots[row], box.resident_weights[row], y, self._from_residents)
        split = box.split_expert[row], box.split_weight[row]
        ops.split_expert(self._ram, self._expert_shape, *split, y, self._from_residents)
        self._predict(row + 1, self._next_gates[row], y)
        ops.wait(box.uploaded[row])
        self._experts(box.upload_slots[row], box.upload_weights[row], y, self._from_uploads)
        ops.wait(box.summed[row])
        return [*shared, self._from_residents, self._from_uploads, box.cpu_sums[row]]

    def _predict(self, row: int, gate: Router | None, y: Tensor) -> None:
        """Predict the next MoE layer's experts: its router chooses from this layer's input, close to its own.

        The GPU has read its share of the split expert from RAM by then, and would only wait for uploads or
        the CPU: a prediction costs no time.
        """
        if gate is not None:
            ops, box = self._ops, self._box
            logits = ops.gemv(y, gate.weight, torch.float32)
            bias, ids, flag = gate.e_score_correction_bias, box.predicted_ids[row], box.predicted[row]
            ops.predict(logits, bias, gate.config, ids, flag)

    def _experts(self, listed: Tensor, weights: Tensor, y: Tensor, out: Tensor) -> None:
        self._ops.experts_one(self._slab, self._expert_shape, listed, weights, y, out)
