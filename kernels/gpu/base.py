"""The interface of a model's GPU side: the operations that a decode step and a prompt are made of.

Shapes: H hidden_size, I moe_intermediate_size, A heads, R kv_lora_rank, P qk_rope_head_dim, Q query width,
C cache capacity, E n_routed_experts, k num_experts_per_tok, T tokens. Operations are for one token unless
their shapes name T. Tensors are contiguous. Outputs are allocated unless an argument says that it is written.

Every operation but `route` and `experts_many` can be captured in a CUDA graph: it does not wait for the
device, and no tensor's content decides what it launches.

The mailbox is pinned memory that GPU and host share while a program runs. A flag is an int32 whose rise from
0 to 1 announces what was written before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

ROUND_PAIRS = 8192
"""Pairs of expert and token that `Ops.experts_many` computes at a time: each pair's results take
4 (H + I / 2) bytes."""


class RouterSpec(Protocol):
    """The router's settings, named as in the checkpoint's config; a `ModelConfig` has them."""

    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def n_group(self) -> int: ...
    @property
    def topk_group(self) -> int: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def routed_scaling_factor(self) -> float: ...


class Ops(Protocol):
    """The operations. `load_ops` gives Triton kernels on a GPU and plain torch on the CPU."""

    def wait(self, flag: Tensor) -> None:
        """Hold the stream until `flag[0]`, int32 in pinned or device memory, is not 0."""

    def post(
        self,
        ids: Tensor,
        weights: Tensor,
        hidden: Tensor,
        mailbox_ids: Tensor,
        mailbox_weights: Tensor,
        mailbox_hidden: Tensor,
        flag: Tensor,
    ) -> None:
        """Copy a token's choice of experts and their input to the mailbox; then raise `flag`.

        Args:
            ids, mailbox_ids: int32 [k].
            weights, mailbox_weights: fp32 [k].
            hidden, mailbox_hidden: bf16 [H].
            flag: int32 in pinned memory; its first element becomes 1.
        """

    def combine_norm(
        self,
        x: Tensor,
        terms: Sequence[Tensor],
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Add up to four `terms` to the residual `x` in place, in order, and return its RMSNorm.

        Args:
            x: fp32 [H].
            terms: fp32 or bf16 [H], on the device or in pinned memory.
            weight: fp32 [H].

        Returns:
            `x / sqrt(mean(x^2) + eps) * weight`, `out_dtype` [H].
        """
        ...

    def gemv(self, x: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`w [N, K] @ x [K]` with fp32 sums: [N] in `out_dtype`, or in w's. Operands are bf16 or fp32."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `gate_up [2I]`, gate first: [I] in its dtype."""
        ...

    def latents(
        self,
        q_kv: Tensor,
        q_weight: Tensor | None,
        kv_weight: Tensor,
        rotations: Tensor,
        position: Tensor,
        cache: Tensor,
        eps: float = 1e-6,
    ) -> Tensor:
        """Norm the query's latent, and write the token's row of the cache.

        Args:
            q_kv: bf16 [Q + R + P], the output of `q_kv_a_proj`.
            q_weight: fp32 [Q], or None where the model has no query rank.
            kv_weight: fp32 [R].
            rotations: fp32 [2, C, P / 2], cosines then sines of each position.
            position: int64 [1] on the device.
            cache: bf16 [C, R + P]; row `position` becomes the normed latent and the rotated key.

        Returns:
            bf16 [Q], normed if there is a `q_weight`; it may share memory with `q_kv`.
        """
        ...

    def absorb(self, q: Tensor, kv_b: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
        """Map queries to the latent space, and rotate their positional part.

        Args:
            q: bf16 [A * (nope + P)].
            kv_b: bf16 [A, nope + v, R], `kv_b_proj` per head.
            rotations, position: as in `latents`.

        Returns:
            bf16 [A, R + P].
        """
        ...

    def mla_decode(self, q: Tensor, cache: Tensor, position: Tensor, scale: float, rank: int) -> Tensor:
        """Attend to rows 0 to `position` of the cache: whole rows are keys, their first `rank` values values.

        Args:
            q: bf16 [A, R + P].
            cache: bf16 [C, R + P].
            position: int64 [1] on the device.
            scale: of the scores.
            rank: R.

        Returns:
            fp32 [A, R].
        """
        ...

    def value_up(self, o: Tensor, kv_b: Tensor, v_head_dim: int) -> Tensor:
        """Map `o [A, R]` to values by the last `v_head_dim` rows of each head of `kv_b`: bf16 [A * v]."""
        ...

    def route(self, logits: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        """Choose experts (arXiv 2412.19437, section 2.1.2).

        Args:
            logits: fp32 [T, E].
            bias: fp32 [E], `e_score_correction_bias`: it takes part in the choice, not in the weights.

        Returns:
            Ids int64 [T, k], best first, and weights fp32 [T, k].
        """
        ...

    def route_and_post(
        self,
        logits: Tensor,
        bias: Tensor,
        spec: RouterSpec,
        hidden: Tensor,
        mailbox_ids: Tensor,
        mailbox_weights: Tensor,
        mailbox_hidden: Tensor,
        flag: Tensor,
    ) -> None:
        """`route` for one token's `logits` fp32 [E], then `post`, with ids as int32."""

    def predict(
        self, logits: Tensor, bias: Tensor, spec: RouterSpec, mailbox_ids: Tensor, flag: Tensor
    ) -> None:
        """Choose as `route` does from one token's `logits` fp32 [E], and post the ids alone.

        Args:
            mailbox_ids: int32 [k] in pinned memory.
            flag: int32; its first element becomes 1 after the ids and after all operations before this one.
        """

    def experts_one(
        self,
        slab: Tensor,
        shape: tuple[int, int],
        listed: Tensor,
        weights: Tensor,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Write the weighted sum of the listed slots' experts for one token.

        Args:
            slab: uint8 [slots, stride], one expert's bytes each (`slots.py`).
            shape: (H, I).
            listed: int32 [1 + k]: how many slots, then which. It may be pinned memory, which the kernel
                reads.
            weights: fp32 [k]; may be pinned memory, too.
            hidden: bf16 [H].
            out: fp32 [H], overwritten; zeros if no slot is listed.
        """

    def split_expert(
        self,
        ram: Tensor,
        shape: tuple[int, int],
        split: Tensor,
        weight: Tensor,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Add the weighted output of an expert's first r inner rows, read from RAM, for one token.

        The expert is split: the CPU computes its other inner rows.

        Args:
            ram: uint8 [rows, stride], one expert's bytes each, registered with the device.
            shape: (H, I).
            split: int32 [2] or longer: a row of `ram`, or -1 for none; and r, a multiple of 32 from 0 to I.
                It may be pinned memory, which the kernel reads, as may `weight`.
            weight: fp32 [1].
            hidden: bf16 [H].
            out: fp32 [H], added to: `weight * down[:, :r] @ (silu(gate[:r] @ x) * (up[:r] @ x))`.
        """

    def experts_many(
        self,
        slab: Tensor,
        shape: tuple[int, int],
        slots: Tensor,
        offsets: Tensor,
        tokens: Tensor,
        weights: Tensor,
        hidden: Tensor,
        out: Tensor,
        counts: list[int] | None = None,
    ) -> None:
        """Add n experts' weighted outputs for their tokens to `out`.

        The expert in `slots[i]` has the pairs j from `offsets[i]` to `offsets[i + 1]`, and
        `out[tokens[j]] += weights[j] * expert_i(hidden[tokens[j]])`.

        Args:
            slab, shape: as in `experts_one`.
            slots: int32 [n].
            offsets: int32 [n + 1], ascending from 0 to m.
            tokens: int32 [m], rows of `hidden`.
            weights: fp32 [m].
            hidden: bf16 [T, H].
            out: fp32 [T, H], added to in place.
            counts: pairs of each expert, if the host knows them; without them they are copied from the
                device.
        """
