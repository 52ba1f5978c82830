"""The shape of the code: imports go down the floors of docs/architecture.md; folders and files stay small."""

import ast
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

from helpers.paths import ROOT

LARGEST_FILE_LINES = 450
MOST_FILES_IN_A_FOLDER = 15
SOURCE = {".py", ".pyi", ".cpp", ".h", ".css", ".html", ".sh"}
LINKS = ROOT / "src" / "moebox"


def tracked_sources() -> list[Path]:
    """Source files that git knows, links and what they lead to left out."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [ROOT / name for name in names]
    return [path for path in paths if path.suffix in SOURCE and path.is_file() and not path.is_symlink()]


def modules() -> dict[str, Path]:
    """Every module of the package by its name under `moebox`; the package itself is `moebox`."""
    found = {}
    for path in tracked_sources():
        relative = path.relative_to(LINKS if path.is_relative_to(LINKS) else ROOT)
        top = relative.parts[0]
        if path.suffix == ".py" and (path.is_relative_to(LINKS) or (LINKS / top).is_symlink()):
            parts = relative.with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name or "moebox"] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Modules of moebox that a file imports, anywhere in it: in functions and under TYPE_CHECKING, too.

    `_kernels`, the compiled module, is below all floors.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            names |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix("moebox.") in MODULES else base
                for alias in node.names
                if alias.name != "_kernels"
            }
    inside = {name for name in names if name.split(".")[0] == "moebox"} - {"moebox._kernels"}
    return {name.removeprefix("moebox.") for name in inside}


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def floors() -> list[list[str]]:
    """The floors that docs/architecture.md draws, the lowest first."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = text.split("```floors\n", 1)[1].split("```", 1)[0]
    return [[name.strip() for name in line.split(",")] for line in block.splitlines() if line.strip()]


def entry_of(module: str, entries: list[str]) -> str:
    """The longest entry of the floors that `module` is, or lies in."""
    fitting = [entry for entry in entries if f"{module}.".startswith(f"{entry}.")]
    assert fitting, f"{module}: on no floor of docs/architecture.md"
    return max(fitting, key=len)


def unit_of(module: str) -> str:
    """What is checked for cycles: a folder without subpackages, or a file beside subpackages."""
    path = MODULES[module]
    nested = path.name == "__init__.py" or any(path.parent.glob("*/__init__.py")) or path.parent == ROOT
    return module if nested else module.rpartition(".")[0]


def test_every_import_goes_to_a_lower_floor():
    levels = {entry: level for level, names in enumerate(floors()) for entry in names}
    entries = list(levels)
    wrong = []
    for module, targets in IMPORTS.items():
        own = entry_of(module, entries)
        for target in targets:
            other = entry_of(target, entries)
            if other != own and levels[other] >= levels[own]:
                wrong.append(f"{module} ({own}) imports {target} ({other})")
    assert not wrong, "\n".join(wrong)


def test_the_floors_name_only_what_there_is():
    names = [name for floor in floors() for name in floor]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert not [name for name in names if not any(f"{module}.".startswith(f"{name}.") for module in MODULES)]


def test_packages_import_each_other_one_way():
    graph = defaultdict(set)
    for module, targets in IMPORTS.items():
        graph[unit_of(module)] |= {unit_of(target) for target in targets} - {unit_of(module)}
    left = {unit for targets in graph.values() for unit in targets} | set(graph)
    while leaves := {unit for unit in left if not graph[unit] & left}:
        left -= leaves
    assert not left, f"in cycles, or above one: {sorted(left)}"


def test_runtime_and_quantize_meet_in_the_model_only():
    across = {
        (module, target)
        for module, targets in IMPORTS.items()
        for target in targets
        if {module.split(".")[0], target.split(".")[0]} == {"runtime", "quantize"}
    }
    assert not {pair for pair in across if not pair[1].startswith("runtime.model")}


def test_no_file_is_long():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in tracked_sources()}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LARGEST_FILE_LINES}


def test_no_folder_is_a_drawer():
    counts = Counter(path.parent.relative_to(ROOT) for path in tracked_sources())
    assert not {str(folder): n for folder, n in counts.items() if n > MOST_FILES_IN_A_FOLDER}


def test_the_links_are_the_list_of_parts():
    links = {path.name: path for path in LINKS.iterdir() if path.is_symlink()}
    assert all(path.resolve() == ROOT / name for name, path in links.items())
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"assets", "cli.py"}
    assert set(links) == packages
