"""What a check finds, and where the system tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One check's result.

    Attributes:
        id: part of the machine and what was looked at, such as "ram.bandwidth".
        status: fail where moebox does not run right, warn where it runs slower or with less than it could.
        seen: what was found.
        costs: what that costs; empty where nothing.
        fix: what to do about it; of a skipped check, how to have it made.
        subject: which one, where there may be several: a drive, a GPU, a folder.
        figures: what was measured, units in the names.
    """

    id: str
    status: Status
    seen: str
    costs: str = ""
    fix: str = ""
    subject: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Roots:
    """Where the kernel shows what it knows; others in tests."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")


def unmeasured(id: str, error: Exception, subject: str = "") -> Check:
    """A bandwidth that could not be measured, which something must keep from working."""
    what, _, fix = str(error).partition("\n")
    costs = "It is not known, and what stands in the way may stand in the model's way too."
    return Check(id, "warn", f"not measured: {what}", costs, fix or "Close other programs.", subject)


def read_text(path: Path) -> str | None:
    """A small file's text without white space around it; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
