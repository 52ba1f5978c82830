"""The Python interface of the package: what `import moebox` promises."""

import subprocess
import sys

import pytest

import moebox
from moebox.quantize.synth.write import synth


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


@pytest.mark.parametrize("statement", ["import moebox", "import moebox.cli", "import moebox.errors"])
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
