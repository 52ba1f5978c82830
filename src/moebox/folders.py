"""The user's folders in which moebox keeps files (XDG base directory specification)."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """Folder of statistics, the machine's profile and the ledger (`XDG_DATA_HOME`). Not created here."""
    return _base("XDG_DATA_HOME", ".local/share")


def config_folder() -> Path:
    """Folder of files that the user writes, such as prices (`XDG_CONFIG_HOME`). Not created here."""
    return _base("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """Folder of the history of the chat's input (`XDG_STATE_HOME`). Not created here."""
    return _base("XDG_STATE_HOME", ".local/state")


def _base(variable: str, fallback: str) -> Path:
    given = Path(os.environ.get(variable) or "")
    # The specification demands that a relative path is ignored.
    return (given if given.is_absolute() else Path.home() / fallback) / "moebox"
