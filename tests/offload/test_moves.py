"""The tables in `offload/__init__.py`: each function that they name exists in the file that they name."""

import importlib
from operator import attrgetter

import pytest

from helpers.paths import ROOT
from moebox import offload

OFFLOAD = ROOT / "offload"


def moves():
    """Rows of the tables, (from, to, when, what decides, file and function); a row may take several lines."""
    rows = []
    for line in offload.__doc__.splitlines():
        if not line.startswith("| ") or line.startswith(("| from", "| ---")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {below}".strip() for above, below in zip(rows[-1], cells, strict=True)]
    return rows


def test_every_tier_is_left_and_reached():
    ends = {tuple(row[:2]) for row in moves()}
    assert {("drive", "RAM"), ("RAM", "GPU"), ("GPU", "RAM"), ("RAM", "-"), ("GPU", "-")} <= ends
    assert all(len(row) == 5 and all(row) for row in moves())


@pytest.mark.parametrize("where", sorted({row[4] for row in moves()}))
def test_the_function_exists(where):
    file, name = where.split()
    text = (OFFLOAD / file).read_text()
    if file.endswith(".cpp"):
        assert f" {name}(" in text
    else:
        module = importlib.import_module("moebox.offload." + file.removesuffix(".py").replace("/", "."))
        assert callable(attrgetter(name)(module))
        assert f"def {name.split('.')[-1]}(" in text
