"""The identity of a model: the same weights give the same digest and folder."""

import json

from helpers.tiny_k2 import micro_config
from moebox.offload.routing.identity import ModelIdentity


def write_checkpoint(folder, config, **manifest):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}})
    )
    if manifest:
        shards = {"model-1.safetensors": {"size": 8, "sha256": manifest["sha256"]}}
        content = {"moebox": "0", "method": "rtn", "source": {}, "shards": shards, "experts": {}, "format": 1}
        (folder / "moebox.json").write_text(json.dumps(content))


def test_identity_follows_the_weights_not_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_checkpoint(tmp_path / "a model", micro_config(), sha256="aa")
    write_checkpoint(tmp_path / "moved" / "renamed", micro_config(), sha256="aa")
    write_checkpoint(tmp_path / "other", micro_config(), sha256="bb")
    write_checkpoint(tmp_path / "foreign", micro_config())
    write_checkpoint(tmp_path / "finetune", micro_config())

    model, moved, other, foreign, finetune = (
        ModelIdentity.of(tmp_path / name)
        for name in ("a model", "moved/renamed", "other", "foreign", "finetune")
    )

    assert model.shape == (2, 8, 3)
    assert model.digest == moved.digest
    assert len({model.digest, other.digest, foreign.digest, finetune.digest}) == 4
    assert model.folder() == tmp_path / "data" / "moebox" / "models" / f"a-model-{model.digest}"
    model.folder().mkdir(parents=True)
    assert moved.folder() == model.folder()
