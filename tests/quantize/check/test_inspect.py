"""`moebox inspect`: quantized folders, sources, and everything that is neither."""

import io
import json

import pytest
from rich.console import Console

from helpers.convert import SHARD_BYTES, make_source
from moebox.errors import CheckpointError, ConfigError
from moebox.quantize.check.inspect import inspect, render_inspect
from moebox.quantize.convert import quantize
from moebox.quantize.dryrun import plan, render_plan


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "fp8")


@pytest.fixture
def output(source, tmp_path):
    quantize(source, tmp_path / "int4", shard_bytes=SHARD_BYTES)
    return tmp_path / "int4"


def rendered(report, render) -> str:
    console = Console(file=io.StringIO(), width=160)
    render(report, console)
    return console.file.getvalue()


def test_quantized_folder(output):
    report = inspect(output, verify=True)
    assert report.state == "moebox"
    assert report.verified
    assert (report.experts, report.experts_contiguous) == (36, 36)
    assert [row.layer for row in report.layers] == [1, 2, 3]
    assert len(report.worst) == 10
    assert report.worst[0].rel_rms == max(row.max_rel_rms for row in report.layers)
    assert report.experts_bytes + report.backbone_bytes == report.total_bytes
    assert json.dumps(report.to_dict())
    text = rendered(report, render_inspect)
    assert "deepseek_v3: 4 layers (1 dense, 3 MoE), 12 experts + 1 shared, top 4" in text
    assert "worst experts" in text
    assert "36 of 36 contiguous" in text


@pytest.mark.parametrize(
    ("format", "state"), [("fp8", "unquantized"), ("bf16", "unquantized"), ("int4", "int4")]
)
def test_source_folder(tmp_path, format, state):
    source = make_source(tmp_path / format, format)
    report = inspect(source)
    assert report.state == state
    assert report.layers == []
    assert report.quantized_bytes == plan(source, tmp_path / "out").output_bytes
    assert "would make" in rendered(report, render_inspect)


def test_verify_names_the_shard_that_changed(output):
    shard = sorted(output.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert inspect(output).state == "moebox"
    with pytest.raises(CheckpointError, match=rf"{shard.name}: SHA-256 is [0-9a-f]{{64}}"):
        inspect(output, verify=True)


def test_verify_reports_progress(output):
    reports = []
    inspect(output, verify=True, progress=reports.append)
    assert (
        reports[-1].done_bytes
        == reports[-1].total_bytes
        == sum(p.stat().st_size for p in output.glob("*.safetensors"))
    )
    assert reports[-1].stage == "verify"


def test_verify_needs_hashes(source):
    with pytest.raises(CheckpointError, match=r"moebox\.json"):
        inspect(source, verify=True)


def test_truncated_shard(output):
    shard = sorted(output.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=shard.name):
        inspect(output)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model_type"):
        inspect(tmp_path / "empty")


def test_unfinished_conversion(output):
    (output / "moebox.json").unlink()
    (output / ".moebox").mkdir()
    (output / ".moebox" / "journal.jsonl").write_text('{"method": "rtn"}\n{"shard": "a"}\n')
    with pytest.raises(CheckpointError, match="unfinished conversion, 1 shards so far"):
        inspect(output)


def test_plan_is_rendered(source, tmp_path):
    text = rendered(plan(source, tmp_path / "out"), render_plan)
    for expected in ("left in bf16", "attention", "left out", "inv_freq", "fits", "SHA-256", "GB/s"):
        assert expected in text
