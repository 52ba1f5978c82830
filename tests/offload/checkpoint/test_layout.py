"""The expert layout and the manifest that says where experts lie."""

import json

import pytest

from moebox.config import ModelConfig
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import (
    EXPERT_TENSORS,
    ExpertExtent,
    ExpertLayout,
    Manifest,
    check_extents,
    load_manifest,
)

CONFIG = ModelConfig(
    model_type="kimi_k2",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=2,
    n_shared_experts=1,
    num_experts_per_tok=1,
    first_k_dense_replace=1,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=128,
)
NBYTES = ExpertLayout(CONFIG).nbytes


def write(folder, extents):
    manifest = Manifest("0", "rtn", {}, {}, {1: extents})
    (folder / "moebox.json").write_text(
        json.dumps(manifest.to_dict(), default=lambda extent: extent.__dict__)
    )
    return load_manifest(folder)


def test_an_expert_is_six_tensors_back_to_back():
    layout = ExpertLayout(CONFIG)
    assert len(EXPERT_TENSORS) == len(layout.shapes) == 6
    assert layout.offsets == [0, 1024, 1152, 2176, 2304, 3328]
    assert layout.nbytes == CONFIG.expert_bytes == 3456
    assert layout.shapes[0] == (32, 8)
    assert layout.shapes[5] == (64, 1)


def test_manifest_round_trip(tmp_path):
    (tmp_path / "s").write_bytes(bytes(2 * NBYTES))
    extents = [ExpertExtent("s", 0, NBYTES, 0.09, 0.5), ExpertExtent("s", NBYTES, NBYTES)]
    manifest = write(tmp_path, extents)
    assert manifest.experts == {1: extents}
    check_extents(tmp_path, CONFIG, manifest)
    assert load_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("extents", "message"),
    [
        ([ExpertExtent("s", 0, NBYTES)], "layer 1 has 1 experts"),
        ([ExpertExtent("s", 0, NBYTES), ExpertExtent("s", NBYTES + 1, NBYTES)], "ends at byte"),
        ([ExpertExtent("s", 0, NBYTES), ExpertExtent("s", 0, NBYTES - 1)], "experts.1: 3455 bytes"),
        ([ExpertExtent("s", 0, NBYTES), ExpertExtent("gone", 0, NBYTES)], "gone: No such file"),
    ],
)
def test_impossible_extents_are_named(tmp_path, extents, message):
    (tmp_path / "s").write_bytes(bytes(2 * NBYTES))
    with pytest.raises(CheckpointError, match=message):
        check_extents(tmp_path, CONFIG, write(tmp_path, extents))


def test_other_formats_and_broken_manifests_are_refused(tmp_path):
    (tmp_path / "moebox.json").write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="format 99"):
        load_manifest(tmp_path)
    (tmp_path / "moebox.json").write_text('{"format": 1, "experts": {"1": [{"bogus": 1}]}}')
    with pytest.raises(CheckpointError, match="malformed"):
        load_manifest(tmp_path)
