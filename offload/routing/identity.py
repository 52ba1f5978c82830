"""The identity of a model, and the folder that keeps what moebox learned of it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from moebox.config import ModelConfig, load_config
from moebox.folders import data_folder
from moebox.offload.checkpoint.layout import load_manifest
from moebox.offload.checkpoint.safetensors import read_index

_NAME_CHARACTERS = 80


@dataclass(frozen=True)
class ModelIdentity:
    """What distinguishes a model's routing from another model's.

    Attributes:
        name: the checkpoint folder's name, to be shown.
        digest: 16 hex digits that differ between models. A checkpoint that moebox wrote keeps its digest when
            its folder is moved or renamed.
        layers, n_experts, top_k: L, E and k.
    """

    name: str
    digest: str
    layers: int
    n_experts: int
    top_k: int

    @classmethod
    def of(cls, folder: Path, config: ModelConfig | None = None) -> ModelIdentity:
        """The identity of the checkpoint in `folder`; reads its small files only, no shard.

        Args:
            folder: with `config.json`, and `moebox.json` or an index.
            config: the checkpoint's, where it was read before.

        Raises:
            ConfigError, CheckpointError: as `load_config`, `load_manifest` and `read_index`.
        """
        config = config or load_config(folder)
        name = folder.resolve().name
        numbers = {key: value for key, value in asdict(config).items() if key not in ("prefix", "model_type")}
        digest = hashlib.sha256(_canonical([numbers, _contents(folder, name)])).hexdigest()[:16]
        return cls(name, digest, *config.routing_shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, E, k)."""
        return self.layers, self.n_experts, self.top_k

    def folder(self) -> Path:
        """The folder of this model's statistics; it may not exist yet."""
        models = data_folder() / "models"
        known = sorted(models.glob(f"*-{self.digest}"))
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")[:_NAME_CHARACTERS]
        return known[0] if known else models / f"{plain or 'model'}-{self.digest}"


def _contents(folder: Path, name: str) -> object:
    manifest = load_manifest(folder)
    if manifest is not None:
        return sorted(str(shard.get("sha256")) for shard in manifest.shards.values())
    # Fine-tunes of one model have the same index: without hashes only the folders' names differ.
    return [name, read_index(folder)]


def _canonical(data: object) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
