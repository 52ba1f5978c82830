"""Energy of processors and memory from RAPL, as Linux shows it under /sys/class/powercap."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

from moebox.cost.usage import Method, Source
from moebox.errors import DeviceError

log = logging.getLogger("moebox")

POWERCAP = Path("/sys/class/powercap")
MAX_WATTS = 1000.0
"""More than any package or its memory draws; decides how soon a counter may wrap."""
_KINDS: tuple[tuple[Source, str], ...] = (("cpu", "package-"), ("dram", "dram"))
"""Sources, and the prefix of their zones' names. Other zones are parts of these, or contain them (psys)."""


class _Zone:
    """One counter. It wraps: at 350 W every 12 minutes, with the usual range of 2^32 steps of 61 uJ."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self.range_uj = _number(folder / "max_energy_range_uj")
        self._last_uj = _number(self._file)

    def step_uj(self) -> int:
        """Microjoules since the last call."""
        now_uj = _number(self._file)
        drawn = now_uj - self._last_uj
        self._last_uj = now_uj
        return drawn if drawn >= 0 else drawn + self.range_uj


class RaplEnergy:
    """The zones of one kind, summed over all packages.

    A thread reads the counters twice in the shortest time in which one may wrap (about every two minutes),
    since a long answer or a night without requests may take longer than that.

    Args:
        source: "cpu" or "dram".
        folders: of the zones.

    Raises:
        DeviceError: a counter cannot be read.
    """

    def __init__(self, source: Source, folders: Sequence[Path]) -> None:
        self.source: Source = source
        self._zones = [_Zone(folder) for folder in folders]
        self._lock = threading.Lock()
        self._drawn_uj = 0
        self._stop = threading.Event()
        every_s = min(zone.range_uj for zone in self._zones) / 1e6 / MAX_WATTS / 2
        watch = threading.Thread(
            target=_keep_reading,
            args=(weakref.ref(self), self._stop, every_s),
            name="moebox-rapl",
            daemon=True,
        )
        watch.start()

    def joules(self) -> float:
        """Joules since the zones were opened; never falls. Raises `DeviceError` where a counter is gone."""
        with self._lock:
            self._drawn_uj += sum(zone.step_uj() for zone in self._zones)
            return self._drawn_uj / 1e6

    def method(self, seconds: float) -> Method:
        """A counter steps every millisecond, so it serves windows of any length."""
        return "counter"

    def close(self) -> None:
        """Stop the thread that reads the counters."""
        self._stop.set()


def _keep_reading(energy: weakref.ref[RaplEnergy], stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        source = energy()
        if source is None:
            return
        try:
            source.joules()
        except DeviceError:
            return  # the next call of `joules` raises the error to its caller
        del source


def open_rapl(root: Path = POWERCAP) -> list[RaplEnergy]:
    """Processors and memory whose counters can be read; the log names the others."""
    found = []
    for source, name in _KINDS:
        try:
            folders = [zone for zone in _zones(root) if _text(zone / "name").startswith(name)]
            if folders:
                found.append(RaplEnergy(source, folders))
            else:
                log.info("energy of %s is estimated: %s has no zone of it", source, root)
        except DeviceError as error:
            log.warning("energy of %s is estimated: %s", source, error)
    return found


def _zones(root: Path) -> list[Path]:
    # intel-rapl-mmio shows the same packages a second time.
    return sorted(root.glob("intel-rapl:*"))


def _number(file: Path) -> int:
    text = _text(file)
    try:
        return int(text)
    except ValueError as error:
        raise DeviceError(f"{file} holds no number but {text!r}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError as error:
        fix = f"Let everybody read it: sudo chmod a+r {file.parent.parent}/intel-rapl:*/energy_uj"
        raise DeviceError(f"{file} may be read by root only", fix) from error
    except OSError as error:
        raise DeviceError(f"{file} cannot be read: {error.strerror}") from error
