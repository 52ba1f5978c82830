"""Everything that precedes the first output byte: check source and destination, lay out, count disk space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moebox.config import CONFIG_FILE, ModelConfig, parse_config
from moebox.errors import CheckpointError, PlanError
from moebox.files import free_bytes, writing
from moebox.kernels.cpu import allowed_cpus
from moebox.offload.checkpoint.layout import MANIFEST_FILE
from moebox.quantize.conversion import Conversion
from moebox.quantize.output.journal import WORK_FOLDER
from moebox.quantize.output.shards import plan_shards
from moebox.quantize.output.small_files import bare_config
from moebox.quantize.source.base import HEADER_FOLDER, FileFacts, HeaderStore, Source
from moebox.quantize.source.folder import FolderSource
from moebox.quantize.source.formats import check_quantization, check_source
from moebox.quantize.source.hub import SOURCE_FOLDER, HubSource, parse_hub_id
from moebox.quantize.source.inventory import classify, take_inventory

WORKER_MEMORY_BYTES = 1_200_000_000
"""Memory that all workers together may use for INT4 matrices and converted pieces."""
_PIECES_BYTES = 64 << 20
"""Of a worker, beside its expert's INT4 matrices: the piece of a backbone tensor that it converts."""
_SMALL_FILES_BYTES = 64 << 20
"""Disk space for config, tokenizer, manifest and the like, generously."""


def destination_state(dst: Path) -> str:
    """The state of the folder `dst`: "absent", "empty", "started" or "complete".

    Raises:
        CheckpointError: the folder holds something that `quantize` did not write.
    """
    if not dst.exists():
        return "absent"
    with writing(dst):
        names = {path.name for path in dst.iterdir()}
    if not names:
        return "empty"
    if MANIFEST_FILE in names:
        return "complete"
    if WORK_FOLDER in names:
        return "started"
    raise CheckpointError(
        f"{dst}: holds {sorted(names)[0]}, which moebox did not write",
        "Give a folder that does not exist or is empty.",
    )


def open_source(src: Path | str, work: Path, header: dict[str, Any] | None, *, keep_headers: bool) -> Source:
    """Open the source that `src` names.

    Args:
        src: a checkpoint folder, or a hub id.
        work: `DST/.moebox`; the hub's files go to `DST/source`.
        header: the first line of an earlier run's journal, which says how that run found the shards.
        keep_headers: keep copies of headers, because the source's shards may vanish before the end.

    Raises:
        CheckpointError: there is no such folder or model, or it is damaged.
    """
    facts = revision = None
    if header is not None:
        facts = {file: FileFacts(**fact) for file, fact in header["source"]["files"].items()}
        revision = header["source"]["revision"]
    store = HeaderStore(work / HEADER_FOLDER)
    folder = Path(src)
    repo = None if folder.exists() else parse_hub_id(str(src))
    if repo is not None:
        name, asked = repo
        known = facts if header is not None and header["source"]["name"] == name else None
        return HubSource(name, revision if known else asked, work.parent / SOURCE_FOLDER, store, known)
    if not folder.is_dir():
        raise CheckpointError(f"{src}: no such folder", "Give a checkpoint folder or a hub id, org/model.")
    return FolderSource(folder, store, facts, keep_headers=keep_headers)


def plan_conversion(source: Source, shard_bytes: int) -> Conversion:
    """Check config, index and headers of `source`, and lay the output out.

    Raises:
        ConfigError: `config.json` is of another family or contradicts itself.
        CheckpointError: a tensor is missing, unknown, or of a wrong shape or type; the message names it.
    """
    where = f"{source.name}: {CONFIG_FILE}"
    config = parse_config(source.config, where)
    check_quantization(source.config, where)
    infos = {}
    for name, file in source.weight_map.items():
        if name not in source.headers[file]:
            raise CheckpointError(
                f"{source.name}: {file}: {name}: the index puts it here, the shard lacks it",
                "Fetch the whole checkpoint.",
            )
        infos[name] = source.headers[file][name]
    _refuse_unindexed(source, config)
    inventory = take_inventory(source.weight_map, config)
    for tensors in inventory.experts.values():
        for tensor in tensors:
            check_source(tensor, infos)
    for tensor in inventory.backbone.values():
        check_source(tensor, infos)
    shards = plan_shards(bare_config(config, source.config), shard_bytes)
    return Conversion(source, config, inventory, infos, tuple(shards))


def _refuse_unindexed(source: Source, config: ModelConfig) -> None:
    for file, header in source.headers.items():
        for name in header:
            home = source.weight_map.get(name)
            if home == file or (home is None and classify(name, config).kind == "left_out"):
                continue
            what = "stands in no index" if home is None else f"is a second copy; the index puts it in {home}"
            raise CheckpointError(
                f"{source.name}: {file}: {name}: {what}", "Check that index and shards belong together."
            )


def left_out(conversion: Conversion) -> list[str]:
    """What of the source the output lacks, as `pattern (number of tensors)`."""
    patterns = [f"{name} ({count})" for name, count in sorted(conversion.inventory.left_out.items())]
    remote_code = [f"{CONFIG_FILE}: auto_map (remote code)"] if "auto_map" in conversion.source.config else []
    return patterns + remote_code


def default_workers(config: ModelConfig, workers: int | None) -> int:
    """Threads to use: `workers`, or by default one per core, fewer where `WORKER_MEMORY_BYTES` demands."""
    if workers is not None:
        if workers < 1:
            raise PlanError(f"workers = {workers}, must be at least 1")
        return workers
    per_worker = config.expert_bytes + _PIECES_BYTES
    return max(1, min(allowed_cpus(), WORKER_MEMORY_BYTES // per_worker))


def effective_method(conversion: Conversion, method: str) -> str:
    """`method`, or "passthrough" where the source's experts are INT4 already."""
    first = next(iter(conversion.inventory.experts.values()))[0]
    return "passthrough" if first.encoding == "int4" else method


def check_disk(dst: Path, needed: int, *, delete_source: bool) -> None:
    """Refuse a conversion that would fill the disk: `PlanError` where fewer than `needed` bytes are free."""
    free = free_bytes(dst)
    if needed > free:
        fix = "Free some space, give another destination"
        fix += "." if delete_source else ", or let --delete-source drop source shards on the way."
        raise PlanError(f"{dst}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", fix)


def disk_peak(conversion: Conversion, dst: Path, finished: set[str], lag: int, *, delete_source: bool) -> int:
    """The most bytes that the rest of the conversion takes on the destination's disk at any moment.

    Counted are the output shards and the source shards to fetch, of which the next output shard's are
    fetched ahead. With `delete_source`, a source shard on that disk counts until `lag` output shards after
    the last one that needs it, because so many output shards are open at once.
    """
    todo = [shard for shard in conversion.shards if shard.file not in finished]
    files = [conversion.files(shard) for shard in todo]
    last_use = {file: position for position, needed in enumerate(files) for file in needed}
    taken = peak = _SMALL_FILES_BYTES
    fetched: set[str] = set()
    for position, shard in enumerate(todo):
        ahead = {file for needed in files[position : position + 2] for file in needed}
        taken += shard.size + conversion.source.bytes_to_fetch(ahead - fetched)
        fetched |= ahead
        peak = max(peak, taken)
        if delete_source:
            gone = [file for file, last in last_use.items() if last == position - lag]
            taken -= sum(conversion.source.bytes_freed(file, dst) for file in gone)
    return peak
