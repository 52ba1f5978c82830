"""`config.json` and the tensors of a synthetic checkpoint, by shape and format."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from moebox.config import GROUP_SIZE, ModelConfig, parse_config
from moebox.errors import ConfigError
from moebox.offload.checkpoint.safetensors import TensorSpec
from moebox.quantize.encodings import BIAS_SUFFIX, FP8_BLOCK, FP8_QUANTIZATION, INT4_QUANTIZATION
from moebox.quantize.synth import FORMATS, SHAPES, Format, Shape

KIMI_K2_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

# These widths leave partial 128 x 128 blocks on both axes; in the true shape only one tensor has any.
TINY_CONFIG: dict[str, Any] = KIMI_K2_CONFIG | {
    "bos_token_id": 500,
    "eos_token_id": 501,
    "hidden_size": 160,
    "intermediate_size": 224,
    "kv_lora_rank": 64,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_scaling": KIMI_K2_CONFIG["rope_scaling"] | {"original_max_position_embeddings": 128},
    "v_head_dim": 32,
    "vocab_size": 512,
}

_CONFIGS: dict[Shape, dict[str, Any]] = {"kimi-k2": KIMI_K2_CONFIG, "tiny": TINY_CONFIG}


@dataclass(frozen=True)
class SynthTensor(TensorSpec):
    """A tensor of a synthetic checkpoint; `fill` and `std` name the pool that its values come from."""

    fill: str
    std: float = 1.0


def synth_config(
    shape: Shape = "kimi-k2",
    *,
    layers: int | None = None,
    experts: int | None = None,
    format: Format = "fp8",
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The `config.json` object of a synthetic checkpoint; see `synth` for the arguments and errors."""
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is unknown", f"Shapes are {' and '.join(SHAPES)}.")
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown", f"Formats are {', '.join(FORMATS)}.")
    raw = dict(_CONFIGS[shape])
    if layers is not None:
        raw["num_hidden_layers"] = layers
    if experts is not None:
        raw["n_routed_experts"] = experts
        raw["num_experts_per_tok"] = min(raw["num_experts_per_tok"], experts)
    raw |= overrides or {}
    if raw["num_hidden_layers"] <= raw["first_k_dense_replace"]:
        raise ConfigError(
            f"layers = {raw['num_hidden_layers']} leaves no layer with experts: "
            f"the first {raw['first_k_dense_replace']} are dense",
            f"Ask for at least {raw['first_k_dense_replace'] + 1} layers.",
        )
    quantization = {"fp8": FP8_QUANTIZATION, "int4": INT4_QUANTIZATION}.get(format)
    if quantization is not None:
        raw["quantization_config"] = quantization
    if raw["model_type"] == "kimi_k25":
        raw = _nest(raw)
    parse_config(raw, "synth")
    return raw


def _nest(text: dict[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text | {"model_type": "kimi_k2"},
        "vision_config": {"vt_hidden_size": 32, "vt_num_hidden_layers": 1},
    }
    shared = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    return outer | {name: text[name] for name in shared if name in text}


def synth_tensors(raw: dict[str, Any], format: Format) -> list[SynthTensor]:
    """Every tensor of the checkpoint that `raw` (a `config.json` object) describes, in file order."""
    config = parse_config(raw, "synth")
    text = raw.get("text_config", raw)
    tensors: list[SynthTensor] = []
    for name, shape in config.backbone_shapes().items():
        if name.endswith("mlp.gate.weight"):
            layer = int(name.removeprefix(config.prefix).split(".")[2])
            tensors += _experts(config, layer, format)
        tensors += _backbone(name, shape, format)
        if format == "fp8" and name.endswith("input_layernorm.weight"):
            stem = name.removesuffix("input_layernorm.weight")
            tensors.append(SynthTensor(f"{stem}self_attn.rotary_emb.inv_freq", "BF16", (56,), "norm"))
    for extra in range(text.get("num_nextn_predict_layers") or 0):
        tensors += _next_token_layer(config, config.num_hidden_layers + extra, format)
    if config.prefix:
        tensors += [
            SynthTensor("vision_tower.encoder.blocks.0.wqkv.weight", "BF16", (96, 32), "normal", 2**-3),
            SynthTensor("mm_projector.proj.0.weight", "BF16", (32, 32), "normal", 2**-3),
        ]
    return tensors


def _next_token_layer(config: ModelConfig, layer: int, format: Format) -> list[SynthTensor]:
    """The tensors of a next-token prediction layer, which DeepSeek-V3 has after its last decoder layer."""
    stem, like = config.layer_name(layer), config.layer_name(config.num_hidden_layers - 1)
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}.embed_tokens.weight": (vocab, hidden),
        f"{stem}.enorm.weight": (hidden,),
        f"{stem}.hnorm.weight": (hidden,),
        f"{stem}.eh_proj.weight": (hidden, 2 * hidden),
        f"{stem}.shared_head.norm.weight": (hidden,),
        f"{stem}.shared_head.head.weight": (vocab, hidden),
    }
    for name, shape in config.backbone_shapes().items():
        if name.startswith(f"{like}."):
            shapes[stem + name.removeprefix(like)] = shape
    tensors = _experts(config, layer, format)
    for name, shape in shapes.items():
        tensors += _backbone(name, shape, "bf16" if "eh_proj" in name else format)
    return tensors


def _experts(config: ModelConfig, layer: int, format: Format) -> list[SynthTensor]:
    make = {"fp8": _fp8, "bf16": _bf16, "int4": _int4}[format]
    return [
        tensor
        for expert in range(config.n_routed_experts)
        for projection, shape in config.expert_shapes().items()
        for tensor in make(f"{config.expert_name(layer, expert)}.{projection}.weight", shape)
    ]


def _backbone(name: str, shape: tuple[int, ...], format: Format) -> list[SynthTensor]:
    if name.endswith(BIAS_SUFFIX):
        return [SynthTensor(name, "F32", shape, "bias")]
    if len(shape) == 1:
        return [SynthTensor(name, "BF16", shape, "norm")]
    if format == "fp8" and "_proj" in name.rpartition(".layers.")[2]:
        return _fp8(name, shape)
    return _bf16(name, shape)


def _std(fan_in: int) -> float:
    """1/sqrt(fan_in), rounded to a power of two so that all widths share a few pools."""
    return float(2.0 ** round(-log2(fan_in) / 2))


def _bf16(name: str, shape: tuple[int, ...]) -> list[SynthTensor]:
    return [SynthTensor(name, "BF16", shape, "normal", _std(shape[1]))]


def _fp8(name: str, shape: tuple[int, ...]) -> list[SynthTensor]:
    blocks = (ceil(shape[0] / FP8_BLOCK), ceil(shape[1] / FP8_BLOCK))
    return [
        SynthTensor(name, "F8_E4M3", shape, "fp8"),
        SynthTensor(f"{name}_scale_inv", "F32", blocks, "scale_inv", _std(shape[1])),
    ]


def _int4(name: str, shape: tuple[int, ...]) -> list[SynthTensor]:
    rows, columns = shape
    return [
        SynthTensor(f"{name}_packed", "I32", (rows, columns // 8), "nibbles"),
        SynthTensor(f"{name}_scale", "BF16", (rows, columns // GROUP_SIZE), "scale", _std(columns)),
        SynthTensor(f"{name}_shape", "I32", (2,), f"shape:{rows}:{columns}"),
    ]
