"""Checks of versions: tested ones, ones that are too old, and ones that were not tested."""

import tomllib

import pytest

from helpers.paths import ROOT
from moebox.instruments.doctor.checks import software


def test_the_tested_torch_is_the_pinned_one():
    assert f"torch=={software.TESTED_TORCH}" in (ROOT / "constraints.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={software.LEAST_TORCH}" in project["dependencies"]


def test_this_environment():
    assert software.python().status == "pass"
    assert software.torch(software.installed("torch")).status in ("pass", "warn")
    assert software.installed("no-such-package") is None


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.13.0", "pass"), ("2.13.0+cu130", "pass"), ("2.11.1", "warn"), ("2.10.2", "fail"), (None, "fail")],
)
def test_torch(version, status):
    check = software.torch(version)
    assert check.status == status
    assert bool(check.fix) == (status != "pass")


@pytest.mark.parametrize(
    ("version", "has_gpu", "status"),
    [("3.6.0", True, "pass"), ("3.5.1", True, "warn"), (None, True, "fail"), (None, False, "skip")],
)
def test_triton(version, has_gpu, status):
    assert software.triton(version, has_gpu).status == status


def test_releases_compare_as_numbers():
    assert software.release("2.13.0+cpu") == software.release("2.13") == (2, 13)
    assert software.release("2.9.1") < software.release("2.11")
    assert software.release("unknown") == ()
