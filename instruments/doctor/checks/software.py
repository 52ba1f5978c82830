"""Versions of Python, torch and Triton, beside those that moebox needs and was tested with."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata

from moebox.instruments.doctor.checks.base import Check, Topic

TESTED_TORCH = "2.13.0"
"""The release in `constraints.txt`."""
LEAST_TORCH = "2.11"
LEAST_TRITON = "3.6"


def installed(package: str) -> str | None:
    """The installed version; None if the package is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def python() -> Check:
    """The interpreter and the system."""
    topic = Topic("software.python")
    seen = (
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"
    )
    if sys.platform != "linux":
        return topic.failed(
            seen,
            "moebox reads drives and limits by Linux's own means and is not tested elsewhere.",
            "Run it on Linux.",
        )
    return topic.passed(seen)


def torch(version: str | None) -> Check:
    """The installed torch's version."""
    topic = Topic("software.torch")
    if version is None:
        fix = f"pip install torch=={TESTED_TORCH}"
        return topic.failed("torch is not installed", "Nothing runs without it.", fix)
    fix = f"pip install torch=={TESTED_TORCH}, the same build (CPU or CUDA) as now."
    if release(version) < release(LEAST_TORCH):
        return topic.failed(version, f"moebox needs {LEAST_TORCH} or newer.", fix)
    if release(version) != release(TESTED_TORCH):
        costs = f"Tests were run with {TESTED_TORCH}; answers may differ by rounding, and speed may too."
        return topic.warning(version, costs, fix)
    return topic.passed(f"{version}, the tested release")


def triton(version: str | None, has_gpu: bool) -> Check:
    """The installed Triton's version, which is needed with a GPU only."""
    topic = Topic("software.triton")
    if not has_gpu:
        return topic.skipped(f"{version or 'not installed'}; needed with a GPU only")
    fix = "Install torch's CUDA build, which brings the Triton that fits it."
    if version is None:
        costs = "The GPU's kernels are compiled by it: no model loads on the GPU."
        return topic.failed("not installed", costs, fix)
    if release(version) < release(LEAST_TRITON):
        costs = f"The GPU's kernels were tested with {LEAST_TRITON}; an older one may not compile them."
        return topic.warning(version, costs, fix)
    return topic.passed(version)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, less zeros at the end: "2.13.0+cpu" -> (2, 13)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
