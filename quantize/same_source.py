"""Whether a destination was begun, or completed, from the source and with the options of this run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import Manifest
from moebox.quantize.conversion import Conversion
from moebox.quantize.output.small_files import digest
from moebox.quantize.source.base import Source
from moebox.quantize.source.folder import sample_sha256
from moebox.quantize.source.hub import parse_hub_id
from moebox.version import __version__


def journal_header(conversion: Conversion, method: str, shard_bytes: int) -> dict[str, Any]:
    """The first line of the journal: all that a resumed run must have in common with the run that began."""
    source = conversion.source
    return {
        "moebox": __version__,
        "method": method,
        "shard_bytes": shard_bytes,
        "config": digest(source.config),
        "index": digest(source.weight_map),
        "source": {
            "name": source.name,
            "revision": source.revision,
            "files": {file: facts.to_dict() for file, facts in sorted(source.facts.items())},
        },
    }


def check_same_run(dst: Path, begun: dict[str, Any], header: dict[str, Any]) -> None:
    """Compare this run's `journal_header` with the one that `dst` was begun with.

    Raises:
        CheckpointError: they differ; the message names the first field that does, and both values.
    """
    before = _flat(begun)
    for name, value in _flat(header).items():
        if before.get(name) != value:
            raise CheckpointError(
                f"{dst}: was begun with {name} = {before.get(name)}, now it is {value}",
                "Run the former command, or start over with --no-resume.",
            )


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    source = header["source"]
    files = {
        f"{file}: {fact}": value for file, facts in source["files"].items() for fact, value in facts.items()
    }
    return header | {"source": source["name"], "revision": source["revision"]} | files


def manifest_source(source: Source) -> dict[str, Any]:
    """What `moebox.json` says of the source: name, the hub's commit, and the content of each shard."""
    files = {file: facts.content() for file, facts in sorted(source.facts.items())}
    revision = {"revision": source.revision} if source.revision else {}
    return {"name": source.name, **revision, "files": files}


def manifest_difference(src: Path | str, manifest: Manifest) -> str | None:
    """How `src` differs from the source of a completed conversion; None where no difference is found.

    Source shards that were deleted since are not compared, nor are those on the hub.
    """
    folder = Path(src)
    repo = None if folder.exists() else parse_hub_id(str(src))
    name = repo[0] if repo else folder.resolve().name
    if name != manifest.source.get("name"):
        return f"{manifest.source.get('name')}, not {name}"
    if repo is not None:
        return None
    for file, facts in manifest.source.get("files", {}).items():
        path = folder / file
        if path.exists() and (
            path.stat().st_size != facts["size"] or sample_sha256(path) != facts.get("sample_sha256")
        ):
            return f"{file} was another file then"
    return None
