"""The command line: exit codes, the streams of its output, and the options of each command."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from helpers.paths import ROOT
from moebox.cli import main_group
from moebox.commands import demo
from moebox.commands.options import ByteSize
from moebox.errors import PlanError
from moebox.instruments.bench.options import BenchOptions
from moebox.option_fields import options_of
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model.precision import PRECISIONS


def moebox(*arguments, **environment):
    command = [sys.executable, "-c", "from moebox.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "source"
    synth(folder, "tiny")
    return folder


def test_the_reference_is_the_help_of_the_commands():
    check = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_cli.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr


def test_devices_are_named_or_refused():
    for name in ("tpu", "cuda:", "stand-in"):
        refused = CliRunner().invoke(main_group, ["run", "model", "hello", "--device", name])
        assert refused.exit_code == 2
        assert "is not cpu, cuda or cuda:N" in refused.output


def test_every_option_is_explained():
    for name, command in main_group.commands.items():
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


PYTHON_ONLY = {"dtype", "progress"}
"""Fields of `LoadOptions` that are no options of the command line."""


@pytest.mark.parametrize("command", ["run", "chat"])
def test_every_option_of_loading_is_an_option_of_the_command_with_the_same_default(monkeypatch, command):
    loaded = []
    monkeypatch.setattr(f"moebox.commands.{command}.load_model", lambda *given: loaded.append(given))
    monkeypatch.setattr(f"moebox.runtime.terminal.{command}.main", lambda *_: 0)
    arguments = [command, "folder"] + ["hello"] * (command == "run")
    done = CliRunner().invoke(main_group, arguments, standalone_mode=False)
    assert done.exception is None
    assert loaded == [(Path("folder"), LoadOptions())]
    offered = [parameter.name for parameter in main_group.commands[command].params]
    wanted = [item.name for item in fields(LoadOptions) if item.name not in PYTHON_ONLY]
    assert [name for name in offered if name in wanted] == wanted


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--device", "cuda:1"], "device", "cuda:1"),
        (["--vram", "60GiB"], "vram", 60 << 30),
        (["--ram", "64GB"], "ram", 64 * 10**9),
        (["--backbone", "nf4"], "backbone", "nf4"),
        (["--context", "99"], "context", 99),
        (["--threads", "3"], "threads", 3),
        (["--store", "a", "--store", "b"], "stores", (Path("a"), Path("b"))),
        (["--verify-reads"], "verify_reads", True),
        (["--no-prefetch"], "prefetch", False),
        (["--no-statistics"], "statistics", False),
        (["--record-trace", "file"], "record_trace", Path("file")),
        (["--no-ledger"], "ledger", False),
        (["--user", "ada"], "user", "ada"),
    ],
)
def test_an_option_of_loading_reaches_the_loader(monkeypatch, flags, field, value):
    loaded = []
    monkeypatch.setattr("moebox.commands.run.load_model", lambda *given: loaded.append(given))
    monkeypatch.setattr("moebox.runtime.terminal.run.main", lambda *_: 0)
    done = CliRunner().invoke(main_group, ["run", "folder", "hello", *flags], standalone_mode=False)
    assert done.exception is None
    assert loaded == [(Path("folder"), LoadOptions(**{field: value}))]


def test_precisions_of_the_backbone_are_those_that_loading_knows():
    assert options_of(LoadOptions)["backbone"].choices == PRECISIONS


def test_the_options_of_bench_are_the_fields_of_its_dataclass(monkeypatch):
    asked = []

    def refuse(options, _progress):
        asked.append(options)
        raise PlanError("nothing is measured here")

    monkeypatch.setattr("moebox.instruments.bench.bench.bench", refuse)
    for arguments in (["folder"], ["--shape", "tiny", "--prompt-tokens", "5,7", "--store", "a"]):
        CliRunner().invoke(main_group, ["bench", *arguments], standalone_mode=False)
    tiny = BenchOptions(shape="tiny", prompt_tokens=(5, 7), stores=(Path("a"),))
    assert asked == [BenchOptions(Path("folder")), tiny]
    offered = {parameter.name for parameter in main_group.commands["bench"].params}
    assert offered == {item.name for item in fields(BenchOptions)} | {"as_json"}


def test_bench_loads_a_checkpoint_with_the_options_that_both_have():
    options = BenchOptions(Path("folder"), vram=1, ram=2, context=3, threads=4, stores=("a",), prefetch=False)
    loading = options.load_options(device="cpu", statistics=False)
    assert loading == LoadOptions(
        "cpu", 1, 2, context=3, threads=4, stores=("a",), prefetch=False, statistics=False
    )


@pytest.mark.slow
def test_quantize_and_inspect(source, tmp_path):
    done = moebox("quantize", source, tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["folder"] == str(tmp_path / "out")
    assert "GB/s" in done.stderr
    report = json.loads(moebox("inspect", tmp_path / "out", "--verify", "--json").stdout)
    assert report["verified"] is True
    text = moebox("inspect", tmp_path / "out")
    assert "deepseek_v3" in text.stdout


@pytest.mark.slow
def test_dry_run_writes_nothing(source, tmp_path):
    done = moebox("quantize", source, tmp_path / "out", "--dry-run")
    assert done.returncode == 0
    assert "left in bf16" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_options_come_from_the_environment_too(source, tmp_path):
    done = moebox("quantize", source, tmp_path / "out", MOEBOX_QUANTIZE_DRY_RUN="1")
    assert done.returncode == 0
    assert not (tmp_path / "out").exists()


def test_the_demo_finds_what_is_bundled():
    assert (demo.ASSETS / demo.MODEL / "config.json").is_file()
    assert (demo.ASSETS / "demo.json").is_file()


@pytest.mark.slow
def test_synth_reports_what_it_wrote(tmp_path):
    done = moebox("synth", tmp_path / "s", "--shape", "tiny", "--format", "int4", "--json")
    assert json.loads(done.stdout)["tensors"] > 0
    assert (tmp_path / "s" / "config.json").exists()


@pytest.mark.slow
def test_an_error_is_one_message_with_its_fix_and_exit_code_1(tmp_path):
    done = moebox("inspect", tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unquantized_model_says_which_command_to_run(source):
    done = moebox("run", source, "hello")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["quantize"], ["run", ".", "x", "--top-p", "7"]])
def test_wrong_usage_is_exit_code_2(arguments):
    done = moebox(*arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("60GiB", 60 << 30), ("64gb", 64 * 10**9), ("1.5 MiB", 3 << 19), ("1000000", 10**6), ("2TiB", 2 << 40)],
)
def test_sizes(text, size):
    assert ByteSize().convert(text, None, None) == size


def test_text_instead_of_a_size_is_wrong_usage():
    result = CliRunner().invoke(main_group, ["run", "model", "hi", "--ram", "lots"])
    assert result.exit_code == 2
    assert "60GiB" in result.output


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(source):
    script = f"{sys.executable} -c 'from moebox.cli import main; main()' inspect {source} | true"
    done = subprocess.run(script, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
