"""A model's files: headers, extents and sizes, the reads they take, tokenizer, and in depth all checksums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moebox.errors import CheckpointError, MoeboxError
from moebox.instruments.doctor.checks.base import Check
from moebox.offload.checkpoint.layout import MANIFEST_FILE, load_manifest
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.disk.store import ExpertStore
from moebox.quantize.check.inspect import refuse_unfinished
from moebox.quantize.check.verify import verify_shards
from moebox.quantize.text import format_bytes
from moebox.runtime.text.template import Template
from moebox.runtime.text.tokenizer import MODEL_FILE, Tokenizer
from moebox.units import PAGE_BYTES

Say = Callable[[str], None]


def files(folder: Path, stores: Sequence[Path] = ()) -> tuple[Check, Checkpoint | None]:
    """Config, index, every shard's header, every copy's size; the checkpoint where it is whole."""
    try:
        refuse_unfinished(folder)
        checkpoint = Checkpoint.open(folder, stores)
        _check_sizes(checkpoint)
    except MoeboxError as error:
        return _failed("model.files", error, "The model does not load."), None
    places = [path for paths in checkpoint.shards.values() for path in paths]
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    copies = f", {len(places)} copies of them" if len(places) > len(checkpoint.shards) else ""
    seen = (
        f"{len(checkpoint.tensors):,} tensors, {format_bytes(nbytes)} in {len(checkpoint.shards)} shard(s)"
        f"{copies}: headers and sizes fit together"
    )
    return Check("model.files", "pass", seen, figures={"bytes": float(nbytes)}), checkpoint


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Beside the headers: what the manifest says of each shard. `CheckpointError`"""
    manifest = load_manifest(checkpoint.folder)
    for file, entry in (manifest.shards if manifest else {}).items():
        for path in checkpoint.shards.get(file, []):
            size = path.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(
                    f"{path}: {size} bytes, {MANIFEST_FILE} says {entry['size']}",
                    "The file was replaced since; restore it, or quantize the source again.",
                )


def experts(checkpoint: Checkpoint) -> Check:
    """Whether the experts are INT4 and where the manifest says, and how many reads each takes."""
    try:
        with ExpertStore.open(checkpoint, depth=1) as store:  # no drive is measured for it
            runs = [store.runs(key) for key in range(store.n_keys)]
    except MoeboxError as error:
        fix = f"`moebox quantize {checkpoint.folder} FOLDER` makes INT4 experts of it."
        return _failed("model.experts", error, "The model does not run.", fix)
    scattered = sum(len(reads) > 1 for reads in runs)
    aligned = sum(len(reads) == 1 and reads[0][1] % PAGE_BYTES == 0 for reads in runs)
    figures = {"experts": len(runs), "in_one_read": len(runs) - scattered, "aligned": aligned}
    seen = f"{len(runs):,} experts of {format_bytes(checkpoint.config.expert_bytes)}"
    if not scattered:
        seen += f", one read each, {aligned:,} of them from a page's start"
        return Check("model.experts", "pass", seen, figures=figures)
    return Check(
        "model.experts",
        "warn",
        f"{seen}, {scattered:,} of them in several places",
        "An expert from the drive takes up to six reads instead of one.",
        f"`moebox quantize {checkpoint.folder} FOLDER` writes each in one piece, bit for bit the same.",
        figures=figures,
    )


def tokenizer(checkpoint: Checkpoint) -> Check:
    """Whether text can go in and out: tokenizer and chat template."""
    if not (checkpoint.folder / MODEL_FILE).exists():
        return Check(
            "model.tokenizer",
            "warn",
            f"{checkpoint.folder}: no {MODEL_FILE}",
            "`run`, `chat` and `bench` do not start.",
            f"Copy {MODEL_FILE}, tokenizer_config.json and the chat template from the original model.",
        )
    try:
        loaded = Tokenizer.load(checkpoint.folder, checkpoint.config.vocab_size)
        Template.load(checkpoint.folder, loaded)
    except MoeboxError as error:
        return _failed("model.tokenizer", error, "`run`, `chat` and `bench` do not start.")
    return Check("model.tokenizer", "pass", f"{checkpoint.config.vocab_size:,} tokens, and a chat template")


def checksums(checkpoint: Checkpoint, deep: bool, say: Say) -> Check:
    """With `deep`, every byte of every shard is read and compared with its SHA-256."""
    manifest = load_manifest(checkpoint.folder)
    if manifest is None:
        seen = (
            f"no {MANIFEST_FILE}: moebox did not write this checkpoint, and there is nothing to compare with"
        )
        return Check("model.checksums", "skip", seen)
    if not deep:
        return Check(
            "model.checksums", "skip", "not read", fix="`--deep` reads every byte and compares checksums."
        )
    try:
        verify_shards(checkpoint, manifest, lambda report: say(report.line()))
    except CheckpointError as error:
        return _failed("model.checksums", error, "Weights are wrong: answers may be nonsense.")
    return Check(
        "model.checksums",
        "pass",
        f"SHA-256 of all {len(checkpoint.shards)} shard(s) and checksums of all experts match",
    )


def _failed(id: str, error: MoeboxError, costs: str, fix: str = "") -> Check:
    return Check(id, "fail", error.what, costs, error.fix or fix)
