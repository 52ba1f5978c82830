"""Puts examples/tiny_k2 on the path, as `cd examples/tiny_k2` does, and knows its folders."""

import json
import sys

from helpers.paths import ROOT, TINY_K2

EXAMPLE = ROOT / "examples" / "tiny_k2"
sys.path.insert(0, str(EXAMPLE))

MICRO = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 32,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 160, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip


def micro_config() -> dict:
    """tiny-k2's config.json at a size for tests."""
    return json.loads((TINY_K2 / "config.json").read_text()) | MICRO
