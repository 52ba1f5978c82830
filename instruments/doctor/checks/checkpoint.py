"""A model's files: headers, extents and sizes, reads for each expert, tokenizer, and on request all
checksums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moebox.errors import CheckpointError, MoeboxError
from moebox.instruments.doctor.checks.base import Check, Topic
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
"""Called with what is being done."""
NO_TEXT = "`run`, `chat` and `bench` do not start."


def files(folder: Path, stores: Sequence[Path] = ()) -> tuple[Check, Checkpoint | None]:
    """Check config, index, every shard's header and every copy's size.

    Returns:
        The result, and the checkpoint unless the check failed.
    """
    try:
        refuse_unfinished(folder)
        checkpoint = Checkpoint.open(folder, stores)
        _check_sizes(checkpoint)
    except MoeboxError as error:
        return _failed("model.files", error, "The model does not load."), None
    n_shards, n_files = len(checkpoint.shards), sum(map(len, checkpoint.shards.values()))
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    copies = f", {n_files} copies of them" if n_files > n_shards else ""
    topic = Topic("model.files", figures={"bytes": float(nbytes)})
    seen = (
        f"{len(checkpoint.tensors):,} tensors, {format_bytes(nbytes)} in {n_shards} shard(s){copies}: "
        "headers and sizes fit together"
    )
    return topic.passed(seen), checkpoint


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` if a shard's size is not the manifest's, which headers do not have."""
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
    """Check that the experts are INT4 and where the manifest says, and count the reads that each takes."""
    try:
        with ExpertStore.open(checkpoint, depth=1) as store:  # a given depth: no drive is measured
            runs = [store.runs(key) for key in range(store.n_keys)]
    except MoeboxError as error:
        fix = f"`moebox quantize {checkpoint.folder} FOLDER` makes INT4 experts of it."
        return _failed("model.experts", error, "The model does not run.", fix)
    scattered = sum(len(reads) > 1 for reads in runs)
    aligned = sum(len(reads) == 1 and reads[0][1] % PAGE_BYTES == 0 for reads in runs)
    figures = {"experts": len(runs), "in_one_read": len(runs) - scattered, "aligned": aligned}
    topic = Topic("model.experts", figures=figures)
    seen = f"{len(runs):,} experts of {format_bytes(checkpoint.config.expert_bytes)}"
    if not scattered:
        return topic.passed(f"{seen}, one read each, {aligned:,} of them from a page's start")
    return topic.warning(
        f"{seen}, {scattered:,} of them in several places",
        "An expert from the drive takes up to six reads instead of one.",
        f"`moebox quantize {checkpoint.folder} FOLDER` writes each in one piece, bit for bit the same.",
    )


def tokenizer(checkpoint: Checkpoint) -> Check:
    """Check that tokenizer and chat template load."""
    topic = Topic("model.tokenizer")
    if not (checkpoint.folder / MODEL_FILE).exists():
        return topic.warning(
            f"{checkpoint.folder}: no {MODEL_FILE}",
            NO_TEXT,
            f"Copy {MODEL_FILE}, tokenizer_config.json and the chat template from the original model.",
        )
    try:
        loaded = Tokenizer.load(checkpoint.folder, checkpoint.config.vocab_size)
        Template.load(checkpoint.folder, loaded)
    except MoeboxError as error:
        return _failed(topic.id, error, NO_TEXT)
    return topic.passed(f"{checkpoint.config.vocab_size:,} tokens, and a chat template")


def checksums(checkpoint: Checkpoint, deep: bool, say: Say) -> Check:
    """With `deep`, read every byte of every shard, and compare it with its SHA-256."""
    topic = Topic("model.checksums")
    manifest = load_manifest(checkpoint.folder)
    if manifest is None:
        return topic.skipped(
            f"no {MANIFEST_FILE}: moebox did not write this checkpoint, and there is nothing to compare with"
        )
    if not deep:
        return topic.skipped("not read", "`--deep` reads every byte and compares checksums.")
    try:
        verify_shards(checkpoint, manifest, lambda report: say(report.line()))
    except CheckpointError as error:
        return _failed(topic.id, error, "Weights are wrong: answers may be nonsense.")
    return topic.passed(
        f"SHA-256 of all {len(checkpoint.shards)} shard(s) and checksums of all experts match"
    )


def _failed(id: str, error: MoeboxError, costs: str, fix: str = "") -> Check:
    return Topic(id).failed(error.what, costs, error.fix or fix)
