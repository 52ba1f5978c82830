"""The small files of the output folder: config, index, tokenizer and template, manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebox.config import CONFIG_FILE, ModelConfig
from moebox.files import replace_file, writing
from moebox.offload.checkpoint.layout import MANIFEST_FILE, ExpertExtent, Manifest
from moebox.offload.checkpoint.safetensors import INDEX_FILE
from moebox.quantize.encodings import INT4_QUANTIZATION
from moebox.quantize.output.shards import Shard
from moebox.version import __version__

_ARCHITECTURES = ["DeepseekV3ForCausalLM"]
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "transformers_version")


def output_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The output's `config.json`: the source's, with INT4 experts and without remote code.

    Of a `kimi_k25` config the text model remains; fields that it lacks (token ids) come from the top level.
    The architecture is named `deepseek_v3`, which it equals: transformers knows `kimi_k2` only with remote
    code, and Moonshot's deployment guide names the same remedy. `num_nextn_predict_layers` is 0, since the
    output has no next-token layers.
    """
    if raw["model_type"] == "kimi_k25":
        text: dict[str, Any] = {"architectures": _ARCHITECTURES, **raw["text_config"]}
        text["architectures"] = _ARCHITECTURES
        for name in _CARRIED:
            if raw.get(name) is not None and text.get(name) is None:
                text[name] = raw[name]
    else:
        text = dict(raw)
    for name in ("auto_map", "quantization_config", "compression_config"):
        text.pop(name, None)
    text["model_type"] = "deepseek_v3"
    text["num_nextn_predict_layers"] = 0
    text["dtype" if "dtype" in text else "torch_dtype"] = "bfloat16"
    return text | {"quantization_config": INT4_QUANTIZATION}


def bare_config(config: ModelConfig, raw: Mapping[str, Any]) -> ModelConfig:
    """`config` for the output, whose tensor names have no prefix; `raw` is the source's `config.json`."""
    return dataclasses.replace(config, prefix="", model_type=output_config(raw)["model_type"])


def write_small_files(
    dst: Path, raw: Mapping[str, Any], shards: Sequence[Shard], extra: Mapping[str, Path]
) -> None:
    """Write config and index and copy `extra`; everything but the manifest."""
    _write_json(dst / CONFIG_FILE, output_config(raw))
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(shard.data_bytes for shard in shards)
    _write_json(
        dst / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    for name, path in extra.items():
        with writing(dst / name):
            replace_file(dst / name, path.read_bytes())


def write_manifest(
    dst: Path,
    shards: Sequence[Shard],
    entries: Mapping[str, Mapping[str, Any]],
    *,
    method: str,
    source: dict[str, Any],
    left_out: list[str],
) -> Manifest:
    """Write `moebox.json`; a folder that has it is complete.

    Args:
        entries: shard file -> its line of the journal.
    """
    manifest = Manifest(
        moebox=__version__,
        method=method,
        source=source,
        shards={shard.file: _pick(entries[shard.file], "size", "sha256") for shard in shards},
        experts=_extents(shards, entries),
        left_out=left_out,
    )
    save_manifest(dst, manifest)
    return manifest


def save_manifest(dst: Path, manifest: Manifest) -> None:
    """Write `moebox.json` durably."""
    _write_json(dst / MANIFEST_FILE, manifest.to_dict(), indent=None)


def _pick(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: entry[name] for name in names}


def _extents(
    shards: Sequence[Shard], entries: Mapping[str, Mapping[str, Any]]
) -> dict[int, list[ExpertExtent]]:
    experts: dict[int, list[ExpertExtent]] = {}
    for shard in shards:
        entry = entries[shard.file]
        checksums = entry.get("xxh3", [None] * len(shard.experts))  # None: an older moebox began it
        for position, (layer, _expert) in enumerate(shard.experts):
            rel_rms, max_abs = entry["errors"][position]
            place = shard.file, shard.expert_offset(position), shard.config.expert_bytes
            extent = ExpertExtent(*place, rel_rms, max_abs, checksums[position])
            experts.setdefault(layer, []).append(extent)
    return experts


def _write_json(path: Path, data: Mapping[str, Any], indent: int | None = 2) -> None:
    with writing(path):
        replace_file(path, (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode())


def remove_output(dst: Path, files: Sequence[str]) -> None:
    """Delete what an earlier run wrote; the manifest first, so that the rest does not count as complete."""
    for name in (MANIFEST_FILE, *files, INDEX_FILE, CONFIG_FILE):
        (dst / name).unlink(missing_ok=True)


def digest(data: object) -> str:
    """SHA-256 of `data` as canonical JSON, hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
