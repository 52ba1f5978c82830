"""config.json -> ModelConfig: the spellings of the family, and the files that are refused."""

import json
import math
from dataclasses import replace

import pytest

from moebox.config import load_config, parse_config
from moebox.errors import ConfigError

K2 = {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 131072,
    "eos_token_id": 163585,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}


def test_k2_has_the_published_sizes():
    config = parse_config(K2)
    backbone = sum(math.prod(shape) for shape in config.backbone_shapes().values())
    experts = 60 * 384 * 3 * 7168 * 2048
    assert experts == 1_014_686_023_680
    assert config.routing_shape == (60, 384, 8)
    assert config.kv_width == 576
    # The published total counts weights and norms; the correction biases are 60 * 384 more.
    assert backbone + experts == 1_026_408_232_448
    assert config.expert_bytes == 24_772_608 == 6048 * 4096
    assert config.softmax_scale == pytest.approx(0.1308608, rel=1e-6)
    assert config.eos_token_ids == (163585,)


@pytest.mark.parametrize(("factor", "scale"), [(40.0, 0.1352338), (64.0, 0.1446796)])
def test_softmax_scale_follows_the_yarn_factor(factor, scale):
    raw = K2 | {"rope_scaling": K2["rope_scaling"] | {"factor": factor}}
    assert parse_config(raw).softmax_scale == pytest.approx(scale, rel=1e-6)


def test_rotary_mscale_is_one_unless_an_mscale_is_missing():
    yarn = parse_config(K2).yarn
    assert yarn.rotary_mscale() == 1.0
    for name in ("mscale", "mscale_all_dim"):  # then transformers takes the paper's factor
        assert replace(yarn, **{name: 0.0}).rotary_mscale() == pytest.approx(1.3465735903)


def test_both_spellings_of_the_rope_settings_agree():
    raw = {name: value for name, value in K2.items() if name not in ("rope_scaling", "rope_theta")}
    rope = {name: value for name, value in K2["rope_scaling"].items() if name != "type"}
    raw["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 50000.0}
    assert parse_config(raw) == parse_config(K2)


def test_plain_rope_and_plain_q_proj():
    config = parse_config(K2 | {"model_type": "deepseek_v3", "rope_scaling": None, "q_lora_rank": None})
    assert config.yarn is None
    assert config.softmax_scale == pytest.approx(192**-0.5)
    assert "model.layers.0.self_attn.q_proj.weight" in config.backbone_shapes()


def test_k25_text_config_and_prefix():
    config = parse_config({"model_type": "kimi_k25", "text_config": K2, "vision_config": {}})
    assert config.prefix == "language_model."
    assert config.expert_name(3, 7) == "language_model.model.layers.3.mlp.experts.7"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "kimi_k3"}, "'kimi_k3'"),
        ({"model_type": "kimi_linear"}, "'kimi_linear'"),
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"moe_intermediate_size": 2040}, "moe_intermediate_size"),
        ({"num_experts_per_tok": 385}, "num_experts_per_tok"),
        ({"n_group": 7}, "n_group"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_what_moebox_cannot_run_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(K2 | change)


def test_missing_and_broken_files_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="list"):
        load_config(tmp_path)
