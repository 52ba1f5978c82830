"""`config.json` of the Kimi K2 family -> one frozen dataclass, and the tensors that it implies.

Shapes in this package: T tokens, H hidden_size, I moe_intermediate_size, E n_routed_experts, A
num_attention_heads. Every number is read from the file, none is assumed: members of the family differ in
`beta_fast`, `factor`, `rms_norm_eps` and `eos_token_id`, and a wrong value would give wrong text, not an
error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moebox import _kernels
from moebox.errors import ConfigError

CONFIG_FILE = "config.json"
MODEL_TYPES = ("kimi_k2", "deepseek_v3", "kimi_k25")
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of an expert or of another gated MLP, in the order in which moebox stores them."""
GROUP_SIZE = _kernels.GROUP_SIZE
"""Input columns that share one scale in INT4 checkpoints of the family: 32."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071), keys as in `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def attention_mscale(self) -> float:
        """Factor whose square multiplies the softmax scale: 0.1 * mscale_all_dim * ln(factor) + 1."""
        return _yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def rotary_mscale(self) -> float:
        """Multiplier of cos and sin: 1.0 throughout the family, whose two mscales are equal."""
        if not (self.mscale and self.mscale_all_dim):
            return _yarn_mscale(self.factor, 1.0)
        return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(self.factor, self.mscale_all_dim)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A model of the family, in Hugging Face's field names; derived values are properties."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    routed_scaling_factor: float = 1.0
    q_lora_rank: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    yarn: YarnConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    prefix: str = ""
    """The beginning of tensor names, before `model.` and `lm_head.`: `language_model.` in K2.5 files."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name not in _MAY_BE_ZERO and value <= 0:
                raise ConfigError(f"config: {field.name} = {value}, must be positive")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"config: num_experts_per_tok = {self.num_experts_per_tok} exceeds "
                f"n_routed_experts = {self.n_routed_experts}"
            )
        if self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"config: n_group = {self.n_group}, topk_group = {self.topk_group} do not divide "
                f"{self.n_routed_experts} experts"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % GROUP_SIZE:
                raise ConfigError(
                    f"config: {name} = {getattr(self, name)} is no multiple of {GROUP_SIZE}, the INT4 group"
                )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without rotary position and the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """Indices of the layers that have routed experts."""
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def n_keys(self) -> int:
        """Routed experts of all layers; an expert's key is `moe_index * n_routed_experts + expert`."""
        return len(self.moe_layers) * self.n_routed_experts

    @property
    def routing_shape(self) -> tuple[int, int, int]:
        """MoE layers, routed experts of a layer, experts a token picks: (L, E, k) of a routing trace."""
        return len(self.moe_layers), self.n_routed_experts, self.num_experts_per_tok

    @property
    def kv_width(self) -> int:
        """Elements that the cache keeps of a token in a layer: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times the squared YaRN attention factor at every length."""
        mscale = self.yarn.attention_mscale() if self.yarn else 1.0
        return mscale * mscale / math.sqrt(self.qk_head_dim)

    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """`{"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}`, as [out, in]."""
        return _projection_shapes(self.hidden_size, self.moe_intermediate_size)

    @property
    def expert_bytes(self) -> int:
        """INT4 group-32 bytes of one routed expert: packed values and bf16 scales."""
        weights = sum(rows * columns for rows, columns in self.expert_shapes().values())
        return weights // 2 + weights // GROUP_SIZE * 2

    @property
    def experts_bytes(self) -> int:
        """INT4 bytes of all routed experts of all layers."""
        return self.expert_bytes * self.n_routed_experts * len(self.moe_layers)

    def layer_name(self, layer: int) -> str:
        """`model.layers.{layer}` with the checkpoint's prefix."""
        return f"{self.prefix}model.layers.{layer}"

    def expert_name(self, layer: int, expert: int) -> str:
        """`model.layers.{layer}.mlp.experts.{expert}` with the checkpoint's prefix."""
        return f"{self.layer_name(layer)}.mlp.experts.{expert}"

    def backbone_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor outside the routed experts: full name -> shape ([out, in] for matrices)."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{self.prefix}model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            f"{self.prefix}model.norm.weight": (self.hidden_size,),
            f"{self.prefix}lm_head.weight": (self.vocab_size, self.hidden_size),
        }
        for layer in range(self.num_hidden_layers):
            layer_shapes = self._attention_shapes() | self._mlp_shapes(layer)
            shapes |= {f"{self.layer_name(layer)}.{name}": shape for name, shape in layer_shapes.items()}
        return shapes

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, heads, q_width = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_attention_heads * self.qk_head_dim,
        )
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.kv_a_proj_with_mqa.weight": (self.kv_width, hidden),
            "self_attn.kv_a_layernorm.weight": (self.kv_lora_rank,),
            "self_attn.kv_b_proj.weight": (
                heads * (self.qk_nope_head_dim + self.v_head_dim),
                self.kv_lora_rank,
            ),
            "self_attn.o_proj.weight": (hidden, heads * self.v_head_dim),
        }
        if self.q_lora_rank is None:
            return shapes | {"self_attn.q_proj.weight": (q_width, hidden)}
        return shapes | {
            "self_attn.q_a_proj.weight": (self.q_lora_rank, hidden),
            "self_attn.q_a_layernorm.weight": (self.q_lora_rank,),
            "self_attn.q_b_proj.weight": (q_width, self.q_lora_rank),
        }

    def _mlp_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        if layer not in self.moe_layers:
            return _gated_mlp_shapes("mlp", hidden, self.intermediate_size)
        shapes: dict[str, tuple[int, ...]] = {
            "mlp.gate.weight": (self.n_routed_experts, hidden),
            "mlp.gate.e_score_correction_bias": (self.n_routed_experts,),
        }
        if self.n_shared_experts:
            inner = self.moe_intermediate_size * self.n_shared_experts
            shapes |= _gated_mlp_shapes("mlp.shared_experts", hidden, inner)
        return shapes


_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace")


def _projection_shapes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    return dict(zip(EXPERT_PROJECTIONS, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))


def _gated_mlp_shapes(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = _projection_shapes(hidden, inner)
    return {f"{name}.{projection}.weight": shape for projection, shape in shapes.items()}


def load_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`.

    Raises:
        ConfigError: the file is missing, not JSON, of another family, or lacks a field.
    """
    path = folder / CONFIG_FILE
    return parse_config(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; `ConfigError` names the file where that fails."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "A checkpoint folder holds a config.json.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}, not an object")
    return data


def parse_config(raw: dict[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
    """Turn a `config.json` object into a `ModelConfig`.

    Accepts `kimi_k2`, `deepseek_v3` and `kimi_k25` (whose text model lies in `text_config`) and both
    spellings of the rope settings: `rope_scaling` + `rope_theta`, or transformers 5 `rope_parameters`.

    Raises:
        ConfigError: another model type, a missing or mistyped field, or a feature the family lacks.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported",
            f"moebox runs the Kimi K2 family: {', '.join(MODEL_TYPES)}.",
        )
    text = raw.get("text_config", {}) if model_type == "kimi_k25" else raw
    if model_type == "kimi_k25" and text.get("model_type") not in MODEL_TYPES[:2]:
        raise ConfigError(f"{source}: text_config.model_type is {text.get('model_type')!r}, not 'kimi_k2'")
    _refuse_other_architectures(text, source)
    theta, yarn = _parse_rope(text, source)
    values: dict[str, Any] = {
        "model_type": model_type,
        "rope_theta": theta,
        "yarn": yarn,
        "prefix": "language_model." if model_type == "kimi_k25" else "",
        "eos_token_ids": _token_ids(text.get("eos_token_id", raw.get("eos_token_id"))),
    }
    for field in fields(ModelConfig):
        if field.name in values or text.get(field.name) is None:
            continue
        values[field.name] = _typed(text[field.name], str(field.type), field.name, source)
    try:
        return ModelConfig(**values)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise ConfigError(f"{source}: required field missing: {missing}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.what.removeprefix('config: ')}", error.fix) from None


def _refuse_other_architectures(text: dict[str, Any], source: str) -> None:
    expected = {
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
    }
    for name, value in expected.items():
        if text.get(name, value) != value:
            raise ConfigError(
                f"{source}: {name} = {text[name]!r}; the Kimi K2 family has {value!r}",
                "A model with another value needs other equations, which moebox does not have.",
            )


def _parse_rope(text: dict[str, Any], source: str) -> tuple[float, YarnConfig | None]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if not isinstance(theta, int | float):
        raise ConfigError(f"{source}: rope_theta = {theta!r}, must be a number")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise ConfigError(f"{source}: rope scaling of type {kind!r}; the family has 'yarn' or none")
    if rope.get("truncate", True) is not True:
        raise ConfigError(f"{source}: rope truncate = {rope['truncate']!r}; the family truncates")
    known = {field.name for field in fields(YarnConfig)}
    values = {name: value for name, value in rope.items() if name in known and value is not None}
    try:
        return float(theta), YarnConfig(**values)
    except TypeError as error:
        raise ConfigError(f"{source}: yarn settings: {error}") from None


def _token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(item for item in value if isinstance(item, int)) if isinstance(value, list) else ()


def _typed(value: object, annotation: str, name: str, source: str) -> object:
    if "float" in annotation and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    kind = bool if "bool" in annotation else str if "str" in annotation else int
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{source}: {name} = {value!r}, must be {kind.__name__}")
    return value
