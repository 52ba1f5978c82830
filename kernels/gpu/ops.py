"""The operations a model's GPU side is made of, and where they come from.

Shapes: H hidden_size, I moe_intermediate_size, A heads, R kv_lora_rank, P qk_rope_head_dim, Q query width,
C cache capacity, E n_routed_experts, k num_experts_per_tok, T tokens. One token unless T says otherwise.
Tensors are contiguous. Everything but `route` and `experts_many` can be captured in a CUDA graph: no
operation waits for the device or launches by what a tensor holds; outputs are allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moebox.kernels.gpu.reference.layer import RouterSpec

__all__ = ["Ops", "RouterSpec", "load_ops"]


class Ops(Protocol):
    """Triton kernels on a GPU; plain torch on the CPU, for the stand-in."""

    def wait(self, flag: Tensor) -> None:
        """Hold the stream until `flag[0]`, int32 in pinned or device memory, is not 0."""

    def post(
        self,
        ids: Tensor,
        weights: Tensor,
        hidden: Tensor,
        box_ids: Tensor,
        box_weights: Tensor,
        box_hidden: Tensor,
        flag: Tensor,
    ) -> None:
        """Copy `ids` int32 [k], `weights` fp32 [k], `hidden` bf16 [H] to pinned memory; then raise `flag`."""

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
        """`w [N, K] @ x [K]` with fp32 sums: [N] in `out_dtype`, or w's. bf16 or fp32 operands."""
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
        """Norm the query's latent, and write the token's entry of the cache.

        Args:
            q_kv: bf16 [Q + R + P], what `q_kv_a_proj` made.
            q_weight: fp32 [Q], or None where the model has no query rank.
            kv_weight: fp32 [R].
            rotations: fp32 [2, C, P / 2], cosines then sines of each position.
            position: int64 [1] on the device.
            cache: bf16 [C, R + P]; row `position` becomes the normed latent and the rotated key.

        Returns:
            bf16 [Q], normed if there is a `q_weight`; may share memory with `q_kv`.
        """
        ...

    def absorb(self, q: Tensor, kv_b: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
        """Carry queries into the latent space, and rotate their positional part.

        Args:
            q: bf16 [A * (nope + P)].
            kv_b: bf16 [A, nope + v, R], `kv_b_proj` per head.
            rotations, position: as in `latents`.

        Returns:
            bf16 [A, R + P].
        """
        ...

    def mla_decode(self, q: Tensor, cache: Tensor, position: Tensor, scale: float, rank: int) -> Tensor:
        """Attend to the rows 0 to `position` of the cache, whose first `rank` values are also what is summed.

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
        """Turn `o [A, R]` into values by the last `v_head_dim` rows of each head of `kv_b`: bf16 [A * v]."""
        ...

    def route(self, logits: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
        """Choose experts (arXiv 2412.19437, section 2.1.2).

        Args:
            logits: fp32 [T, E].
            bias: fp32 [E], `e_score_correction_bias`: it chooses and does not weigh.

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
        box_ids: Tensor,
        box_weights: Tensor,
        box_hidden: Tensor,
        flag: Tensor,
    ) -> None:
        """`route` for one token's `logits` fp32 [E], then `post`; the box takes ids as int32."""

    def guess(self, logits: Tensor, bias: Tensor, spec: RouterSpec, box_ids: Tensor, flag: Tensor) -> None:
        """Choose as `route` does from one token's `logits` fp32 [E], and post the ids alone.

        Args:
            box_ids: int32 [k] in pinned memory.
            flag: int32, raised behind them, and behind all operations before.
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
            slab: uint8 [slots, stride], an expert's extent each.
            shape: (H, I).
            listed: int32 [1 + k], how many and which slots; may be pinned memory, read by the kernel.
            weights: fp32 [k], likewise.
            hidden: bf16 [H].
            out: fp32 [H], overwritten; zeros if nothing is listed.
        """

    def expert_part(
        self,
        ram: Tensor,
        shape: tuple[int, int],
        part: Tensor,
        weight: Tensor,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Add the weighted output of an expert's first r inner rows, read straight from RAM, for one token.

        Args:
            ram: uint8 [rows, stride], an expert's extent each, registered with the device.
            shape: (H, I).
            part: int32 [2] or longer: a row of `ram`, or -1 for none; and r, a multiple of 32 from 0 to I.
                May be pinned memory, read by the kernel, as may `weight`.
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

        Args:
            slab, shape: as in `experts_one`.
            slots: int32 [n].
            offsets: int32 [n + 1]; expert i has the pairs from `offsets[i]` to `offsets[i + 1]`.
            tokens: int32 [m], rows of `hidden`.
            weights: fp32 [m].
            hidden: bf16 [T, H].
            out: fp32 [T, H].
            counts: pairs of each expert, known to the host; spares a copy from the device.
        """


def load_ops(device: torch.device) -> Ops:
    """The operations for tensors on `device`: Triton's on a GPU, torch's on the CPU."""
    if device.type == "cuda":
        from moebox.kernels.gpu.triton import ops as triton_ops

        return triton_ops
    from moebox.kernels.gpu.reference import ops as torch_ops

    return torch_ops
