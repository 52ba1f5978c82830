"""Checksums of experts: in what the converter writes, and where an older version began the conversion."""

import pytest
from xxhash import xxh3_64_hexdigest

from helpers.convert import SHARD_BYTES, make_source
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import load_manifest
from moebox.quantize.check.inspect import inspect
from moebox.quantize.convert import quantize
from moebox.quantize.output.journal import Journal


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "fp8")


def checksums(folder):
    return [extent.xxh3 for extents in load_manifest(folder).experts.values() for extent in extents]


def test_the_checksum_is_that_of_the_bytes_on_the_disk(source, tmp_path):
    folder = tmp_path / "int4"
    quantize(source, folder, shard_bytes=SHARD_BYTES)
    manifest = load_manifest(folder)
    assert manifest.format == 2
    for extents in manifest.experts.values():
        for extent in extents:
            shard = (folder / extent.file).read_bytes()
            assert extent.xxh3 == xxh3_64_hexdigest(shard[extent.offset : extent.offset + extent.nbytes])


def test_a_conversion_that_an_older_version_began(source, tmp_path, monkeypatch):
    add_shard = Journal.add_shard

    def without_checksums(journal, entry):
        if len(journal.shards) < 4:
            del entry["xxh3"]
        add_shard(journal, entry)

    monkeypatch.setattr(Journal, "add_shard", without_checksums)
    folder = tmp_path / "int4"
    quantize(source, folder, shard_bytes=SHARD_BYTES)
    known = [
        extent.xxh3 is not None for extents in load_manifest(folder).experts.values() for extent in extents
    ]
    assert True in known
    assert False in known
    assert inspect(folder, verify=True).verified
    assert inspect(folder, add_checksums=True).verified
    assert None not in checksums(folder)


def test_no_checksums_without_a_manifest(source):
    with pytest.raises(CheckpointError, match="nothing to verify against"):
        inspect(source, add_checksums=True)
