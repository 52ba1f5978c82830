"""Folders of the user's where moebox keeps what it learned (XDG base directory specification)."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """What is worth keeping: statistics, the machine's profile (`XDG_DATA_HOME`). Not created here."""
    return _base("XDG_DATA_HOME", ".local/share")


def config_folder() -> Path:
    """What the user sets, such as prices (`XDG_CONFIG_HOME`). Not created here."""
    return _base("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """What a program remembers of its user, such as a history (`XDG_STATE_HOME`). Not created here."""
    return _base("XDG_STATE_HOME", ".local/state")


def _base(variable: str, fallback: str) -> Path:
    given = Path(os.environ.get(variable) or "")
    # The specification: a relative path there is to be ignored.
    return (given if given.is_absolute() else Path.home() / fallback) / "moebox"
