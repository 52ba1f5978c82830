"""The result of a check, how a check makes it, and the system files that checks read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moebox.offload.machine.profile import Part

Status = Literal["pass", "warn", "fail", "skip"]

SLOWER_SHARE = 0.75
"""Below this share of the bandwidth that was measured earlier, something must have changed."""


@dataclass(frozen=True)
class Check:
    """One check's result.

    Attributes:
        id: the part of the machine and what was checked, such as "ram.bandwidth".
        status: fail if moebox does not run right, warn if it runs slower or with less than it could.
        seen: what was found.
        costs: what that costs; empty if nothing.
        fix: what to do about it; of a skipped check, what makes it run.
        subject: the drive, GPU or folder that was checked, if there may be several.
        figures: what was measured, with units in the names.
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
class Topic:
    """What a check is about, as in `Check`; each method makes the check's result."""

    id: str
    subject: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    def passed(self, seen: str) -> Check:
        """Nothing to do."""
        return self._result("pass", seen)

    def warning(self, seen: str, costs: str, fix: str) -> Check:
        """moebox runs slower, or with less, than it could."""
        return self._result("warn", seen, costs, fix)

    def failed(self, seen: str, costs: str, fix: str) -> Check:
        """moebox does not run right."""
        return self._result("fail", seen, costs, fix)

    def skipped(self, seen: str, fix: str = "") -> Check:
        """Nothing was checked; `fix` says what makes the check run."""
        return self._result("skip", seen, fix=fix)

    def not_measured(self, error: Exception) -> Check:
        """A warning that a measurement raised `error`, whose message may have a fix on its second line."""
        what, _, fix = str(error).partition("\n")
        costs = "It is not known, and what stands in the way may stand in the model's way too."
        return self.warning(f"not measured: {what}", costs, fix or "Close other programs.")

    def _result(self, status: Status, seen: str, costs: str = "", fix: str = "") -> Check:
        return Check(self.id, status, seen, costs, fix, self.subject, self.figures)


@dataclass(frozen=True)
class Roots:
    """Where the kernel's file systems are mounted; tests give folders of their own."""

    sys: Path = Path("/sys")
    proc: Path = Path("/proc")


def read_text(path: Path) -> str | None:
    """A small file's text without white space around it; None if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


@dataclass(frozen=True)
class Earlier:
    """A bandwidth that was measured earlier, and the day, as in 2026-01-31."""

    gbps: float
    day: str


def much_faster_earlier(before: Part | None, name: str, gbps: float) -> Earlier | None:
    """The profile's figure `name` if `gbps` is below `SLOWER_SHARE` of it, else None."""
    earlier_gbps = before.figures.get(name, 0.0) if before else 0.0
    if before is None or gbps >= SLOWER_SHARE * earlier_gbps:
        return None
    return Earlier(earlier_gbps, before.measured[:10])
