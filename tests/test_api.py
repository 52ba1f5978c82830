"""The Python interface of the package: what `import moebox` promises."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import moebox
from helpers.chat import write_tokenizer
from moebox.quantize.synth.write import synth
from moebox.runtime.text.tokenizer import Tokenizer


def test_every_promised_name_is_there():
    for name in moebox.__all__:
        assert getattr(moebox, name) is not None, name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = moebox.nonsense


def test_quantize_is_the_function_and_the_package(tmp_path):
    synth(tmp_path / "source", "tiny")
    result = moebox.quantize(tmp_path / "source", tmp_path / "out", method="rtn", workers=1)
    assert (tmp_path / "out" / "moebox.json").exists()
    assert isinstance(result, moebox.QuantizeResult)
    assert moebox.quantize.convert.quantize.__name__ == "quantize"


@pytest.mark.parametrize(
    "statement",
    ["import moebox", "import moebox.cli", "import moebox.errors", "from moebox import LoadOptions"],
)
def test_importing_does_not_wait_for_torch(statement):
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_one_family():
    for name in (
        "ConfigError",
        "CheckpointError",
        "PlanError",
        "TokenizerError",
        "BusyError",
        "RequestError",
    ):
        assert issubclass(getattr(moebox, name), moebox.MoeboxError)
    error = moebox.PlanError("3 missing", "add 3")
    assert (str(error), error.what, error.fix) == ("3 missing\nadd 3", "3 missing", "add 3")


@pytest.fixture
def asked(monkeypatch):
    """The options that `moebox.load` hands to the engine; nothing is loaded."""
    seen = []

    def refuse(_path, options):
        seen.append(options)
        raise moebox.PlanError("nothing is loaded here")

    monkeypatch.setattr("moebox.runtime.engine.engine.Engine.load", refuse)
    return seen


VALUES = {
    "device": "cpu",
    "vram": 1,
    "ram": 2,
    "backbone": "nf4",
    "dtype": torch.float32,
    "context": 3,
    "threads": 4,
    "progress": print,
    "stores": ("a",),
    "verify_reads": True,
    "prefetch": False,
    "statistics": False,
    "record_trace": "trace",
    "ledger": False,
    "user": "ada",
}


def load(folder, *arguments, **keywords):
    with pytest.raises(moebox.PlanError, match="nothing is loaded here"):
        moebox.load(folder, *arguments, **keywords)


@pytest.mark.slow
def test_every_field_of_the_options_is_a_keyword_of_load(tmp_path, asked):
    vocabulary = Tokenizer.load(write_tokenizer(tmp_path / "tokenizer")).n_vocab
    assert list(VALUES) == [item.name for item in fields(moebox.LoadOptions)]
    synth(tmp_path / "model", "tiny", format="int4", config_overrides={"vocab_size": vocabulary})
    write_tokenizer(tmp_path / "model")
    load(tmp_path / "model")
    for name, value in VALUES.items():
        load(tmp_path / "model", **{name: value})
    load(tmp_path / "model", **VALUES)
    load(tmp_path / "model", "cpu", 1, 2)
    kept = moebox.LoadOptions(device="cpu", ram=2, user="ada")
    load(tmp_path / "model", options=kept, user="bob")
    assert asked == [
        moebox.LoadOptions(),
        *(moebox.LoadOptions(**{name: value}) for name, value in VALUES.items()),
        moebox.LoadOptions(**VALUES),
        moebox.LoadOptions("cpu", 1, 2),
        moebox.LoadOptions(device="cpu", ram=2, user="bob"),
    ]
    assert (asked[-3].stores, asked[-3].record_trace) == ((Path("a"),), Path("trace"))


def test_an_unknown_option_of_loading_is_named(tmp_path):
    with pytest.raises(TypeError, match="contxt"):
        moebox.load(tmp_path, contxt=5)
