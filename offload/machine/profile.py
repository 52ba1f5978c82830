"""The machine's profile: measured figures of its parts, kept in `machine.json` in the user's data folder.

A part is a CPU with a number of threads, a GPU, or a drive. Its figures are kept with their date under the
part's identity (`hardware.cpu_identity`, `hardware.gpu_identity`, `drives.drive_at`). Rates are in 1e9 bytes
or 1e12 operations per second, as in `floor.Ceilings`.

Figures by kind of part:

- cpu: `ram_gbps`, `cpu_tflops`
- gpu: the other fields of `Ceilings`, except `nvme_gbps`
- drive: the best bandwidth `gbps`; `depth`, the smallest queue depth that nearly reaches it; and
  `depth_N_gbps` for each measured depth N
- run: how far runs of a model were from the floor
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from moebox.files import locked, replace_file
from moebox.folders import data_folder
from moebox.offload.machine.floor import Ceilings
from moebox.offload.machine.hardware import cpu_identity

log = logging.getLogger("moebox")

PROFILE_FILE = "machine.json"
PROFILE_FORMAT = 1

Kind = Literal["cpu", "gpu", "drive", "run"]
_CEILINGS = frozenset(field.name for field in fields(Ceilings))


@dataclass(frozen=True)
class Part:
    """The figures of one part of the machine.

    Attributes:
        kind: the kind of part.
        identity: distinguishes the part from others of its kind.
        measured: time of the measurement, in UTC, ISO 8601 to the second.
        figures: name, with unit -> finite number.
    """

    kind: Kind
    identity: str
    measured: str
    figures: Mapping[str, float]


class MachineProfile:
    """The parts that were measured; for each kind and identity at most one."""

    def __init__(self, parts: Iterable[Part] = ()) -> None:
        self._parts = {(part.kind, part.identity): part for part in parts}

    @classmethod
    def load(cls, path: Path | None = None) -> MachineProfile:
        """Read the user's profile, or the one at `path`.

        The profile is empty where there is no file. It is empty, too, where the file cannot be used; a
        warning names the file, and the next `save` replaces it.
        """
        path = path or profile_path()
        try:
            return cls(_read(path))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            log.warning(
                "%s: the machine's profile cannot be used (%s): bandwidths count as unknown", path, error
            )
            return cls()

    def save(self, path: Path | None = None) -> bool:
        """Merge the profile with the file, of each part the newer measurement, and replace the file.

        Returns:
            Whether the file was written. Where it was not, a warning says why.
        """
        path = path or profile_path()
        try:
            with locked(path):
                with suppress(OSError, ValueError):  # no file, or a damaged one, of which `load` warns
                    self._take_newer(_read(path))
                replace_file(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            log.warning("%s: the machine's profile is not kept: %s", path, error.strerror or error)
            return False
        return True

    def put(self, kind: Kind, identity: str, figures: Mapping[str, float]) -> Part:
        """Replace the figures of a part by those measured now. `save` writes them to the file.

        Raises:
            ValueError: a figure is not a finite number.
        """
        measured = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        part = _part({"kind": kind, "identity": identity, "measured": measured, "figures": dict(figures)})
        self._parts[kind, identity] = part
        return part

    def find(self, kind: Kind, identity: str) -> Part | None:
        """The figures of a part; None where it was not measured."""
        return self._parts.get((kind, identity))

    def drive_depth(self, identity: str) -> int | None:
        """The drive's best queue depth; None where it was not measured."""
        part = self.find("drive", identity)
        return int(part.figures["depth"]) if part and part.figures.get("depth", 0) >= 1 else None

    def ceilings(
        self, cpu: str | None = None, gpu: str | None = None, drives: Sequence[str] = ()
    ) -> Ceilings | None:
        """The machine's rates, from the figures of its parts; None where its RAM was not measured.

        Args:
            cpu: identity of CPU and threads; None: this machine's, with all threads that are allowed.
            gpu: identity of the GPU that is used; None: no GPU.
            drives: identities of the drives that have the model; their bandwidths are added.
        """
        figures = self._ceilings("cpu", cpu or cpu_identity())
        if not figures.get("ram_gbps"):
            return None
        figures |= self._ceilings("gpu", gpu) if gpu else {}
        known = [part for drive in drives if (part := self.find("drive", drive))]
        return Ceilings(**figures | {"nvme_gbps": sum(part.figures.get("gbps", 0.0) for part in known)})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `load` reads."""
        return {"format": PROFILE_FORMAT, "parts": [asdict(part) for _, part in sorted(self._parts.items())]}

    def _ceilings(self, kind: Kind, identity: str) -> dict[str, float]:
        part = self.find(kind, identity)
        return {name: value for name, value in part.figures.items() if name in _CEILINGS} if part else {}

    def _take_newer(self, parts: Iterable[Part]) -> None:
        for part in parts:
            mine = self.find(part.kind, part.identity)
            if mine is None or part.measured > mine.measured:
                self._parts[part.kind, part.identity] = part


def profile_path() -> Path:
    """The path of the user's profile."""
    return data_folder() / PROFILE_FILE


def _read(path: Path) -> list[Part]:
    data = json.loads(path.read_text("utf-8"))
    if not isinstance(data, dict) or data.get("format") != PROFILE_FORMAT:
        raise ValueError(f"not of format {PROFILE_FORMAT}")
    if not isinstance(data.get("parts"), list):
        raise ValueError("no list of parts")
    return [_part(entry) for entry in data["parts"]]


def _part(entry: Any) -> Part:
    try:
        part = Part(**entry)
        texts = (part.kind, part.identity, part.measured)
        numbers = list(part.figures.values())
    except (TypeError, AttributeError):
        raise ValueError(f"malformed part {entry!r}") from None
    if part.kind not in get_args(Kind) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"malformed part {entry!r}")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"part {part.identity!r}: a figure that is not a finite number")
    return part
