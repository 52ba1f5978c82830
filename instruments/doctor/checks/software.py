"""Python, torch and Triton beside what moebox asks for and was tested with."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata

from moebox.instruments.doctor.checks.base import Check

TESTED_TORCH = "2.13.0"
"""The release that `constraints.txt` names."""
LEAST_TORCH = "2.11"
LEAST_TRITON = "3.6"


def installed(package: str) -> str | None:
    """The installed version, None where the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python() -> Check:
    """The interpreter and the system."""
    seen = (
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    )
    if sys.platform != "linux":
        return Check(
            "software.python",
            "fail",
            seen,
            "moebox reads drives and limits by Linux's own means and is not tested elsewhere.",
            "Run it on Linux.",
        )
    return Check("software.python", "pass", seen)


def torch(version: str | None) -> Check:
    """The installed torch's version."""
    if version is None:
        fix = f"pip install torch=={TESTED_TORCH}"
        return Check("software.torch", "fail", "torch is not installed", "Nothing runs without it.", fix)
    fix = f"pip install torch=={TESTED_TORCH}, the same build (CPU or CUDA) as now."
    if release(version) < release(LEAST_TORCH):
        costs = f"moebox needs {LEAST_TORCH} or newer."
        return Check("software.torch", "fail", version, costs, fix)
    if release(version) != release(TESTED_TORCH):
        costs = f"Tests were run with {TESTED_TORCH}; answers may differ by rounding, and speed may too."
        return Check("software.torch", "warn", version, costs, fix)
    return Check("software.torch", "pass", f"{version}, the tested release")


def triton(version: str | None, has_gpu: bool) -> Check:
    """The installed Triton's version; it is needed with a GPU only."""
    if not has_gpu:
        seen = version or "not installed"
        return Check("software.triton", "skip", f"{seen}; needed with a GPU only")
    fix = "Install torch's CUDA build, which brings the Triton that fits it."
    if version is None:
        costs = "The GPU's kernels are compiled by it: no model loads on the GPU."
        return Check("software.triton", "fail", "not installed", costs, fix)
    if release(version) < release(LEAST_TRITON):
        costs = f"The GPU's kernels were tested with {LEAST_TRITON}; an older one may not compile them."
        return Check("software.triton", "warn", version, costs, fix)
    return Check("software.triton", "pass", version)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without zeros at the end: "2.13.0+cpu" -> (2, 13)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
