"""`Usage` is the only list of figures: rows, sums, JSON, CSV and pieces follow from its fields."""

import json
import subprocess
import sys
from dataclasses import asdict, fields

import pytest

from helpers.ledger import record
from helpers.paths import TESTS
from moebox.cost.economics import PARTS
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.rows import REQUEST_COLUMNS, USAGE_COLUMNS, record_of, request_row
from moebox.cost.prices.box_prices import Prices
from moebox.cost.report.report import ReportOptions, make_report
from moebox.cost.report.rows import csv_rows
from moebox.cost.usage import METHODS, SECONDS, SOURCES, TOKENS, TRAFFIC_FIELDS, Joules, Usage
from moebox.cost.words import METHOD_NAMES, PART_NAMES, SOURCE_NAMES
from moebox.runtime.terminal.chat import Totals
from moebox.runtime.text.pieces import Stats

USED = record("1").usage
TWICE = USED + USED


def stats_of(usage):
    return Stats(
        usage,
        prompt_tokens=usage.prompt_tokens,
        decoded_tokens=3,
        ttft_s=0.5,
        finish_reason="stop",
        seed=1,
        context_used=9,
        context=99,
    )


def test_every_field_is_a_column_or_a_group_of_columns():
    groups = {"traffic": TRAFFIC_FIELDS, "energy": tuple(f"{source}_joules" for source in SOURCES)}
    for field in fields(Usage):
        assert set(groups.get(field.name, (field.name,))) <= set(USAGE_COLUMNS)
    assert set(TOKENS) | set(SECONDS) | set(groups) == {field.name for field in fields(Usage)}


def test_a_row_gives_back_every_field():
    assert record_of(request_row(record("1"))) == record("1")
    assert len(request_row(record("1"))) == len(REQUEST_COLUMNS) == len(set(REQUEST_COLUMNS))


def test_a_sum_adds_every_field():
    for name in (*TOKENS, *SECONDS, "joules", "computed_tokens", "work_s"):
        assert getattr(TWICE, name) == 2 * getattr(USED, name) != 0
    assert TWICE.traffic == USED.traffic + USED.traffic
    assert USED + Usage() == Usage() + USED == USED
    one, two = (Usage(energy=(Joules("cpu", number, "counter"),)) for number in (1, 2))
    assert one + two == Usage(energy=(Joules("cpu", 3, "counter"),))


def test_the_ledger_sums_every_field(tmp_path):
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.add(record("1"), record("2"))
        (total,) = ledger.totals()
    assert total.usage == TWICE


def test_a_chat_sums_every_field():
    totals = Totals()
    for _ in range(2):
        totals.add(stats_of(USED))
    assert (totals.answers, totals.usage) == (2, TWICE)


def test_json_and_csv_show_every_field(tmp_path):
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.add(record("1"))
        report = make_report(ledger, ReportOptions(Prices()))
    shown = json.loads(json.dumps(asdict(USED)))
    for figures in (stats_of(USED).to_dict(), report.to_dict()["total"]):
        data = json.loads(json.dumps(figures))
        assert {name: data[name] for name in shown} == shown
    heading, *_, total = csv_rows(report)
    row = dict(zip(heading, total, strict=True))
    for name in (*TOKENS, *SECONDS):
        assert row[name] == getattr(USED, name)
    for name in TRAFFIC_FIELDS:
        assert row[name] == getattr(USED.traffic, name)


@pytest.mark.parametrize(
    ("names", "keys"), [(SOURCE_NAMES, SOURCES), (METHOD_NAMES, METHODS), (PART_NAMES, PARTS)]
)
def test_every_source_method_and_part_has_a_readable_name(names, keys):
    assert tuple(names) == keys


NEW_FIELDS = """
import importlib.util, json, sys
from pathlib import Path

def load(name, old, new):
    '''Import a module from its source, in which one line is replaced.'''
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text()
    assert source.count(old) == 1
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    exec(compile(source.replace(old, new), spec.origin, "exec"), module.__dict__)

line = "    disk_bytes: int = 0\\n"
load("moebox.offload.traffic", line, line + "    nvlink_bytes: int = 0\\n")
line = "    completion_tokens: int = _tokens()\\n"
load("moebox.cost.usage", line, line + "    draft_tokens: int = _tokens()\\n")
load("moebox.cost.ledger.schema", "MIGRATIONS: tuple[Migration, ...] = (_FIRST,)", '''MIGRATIONS = (_FIRST, (
    "ALTER TABLE requests ADD COLUMN draft_tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE requests ADD COLUMN nvlink_bytes INTEGER NOT NULL DEFAULT 0",
))''')

from helpers.ledger import changed, record
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.prices.box_prices import Prices
from moebox.cost.report.report import ReportOptions, make_report
from moebox.cost.report.rows import csv_rows
from moebox.cost.usage import Traffic
from moebox.runtime.text.pieces import Stats

with Ledger.open(Path(sys.argv[1])) as ledger:
    new = changed(record("new"), draft_tokens=7, traffic=Traffic(nvlink_bytes=9))
    ledger.add(new)
    assert {row.id: row for row in ledger.requests()} == {"new": new, "old": record("old")}
    report = make_report(ledger, ReportOptions(Prices()))
stats = Stats((new.usage + new.usage), 100, 3, 0.5, "stop", 1, 9, 99)
print(json.dumps({"report": report.to_dict()["total"], "stats": stats.to_dict(),
                  "tokens": new.usage.of_unit("tokens"), "csv": csv_rows(report)}))
"""


def test_a_new_figure_is_one_line_and_a_migration(tmp_path):
    """With a field added to `Usage` and one to `Traffic`, an older ledger opens and everything shows them."""
    with Ledger.open(tmp_path / "ledger") as ledger:
        ledger.add(record("old"))
    done = subprocess.run(
        [sys.executable, "-c", NEW_FIELDS, str(tmp_path / "ledger")],
        env={"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["report"]["draft_tokens"], shown["report"]["traffic"]["nvlink_bytes"]) == (7, 9)
    assert (shown["stats"]["draft_tokens"], shown["stats"]["traffic"]["nvlink_bytes"]) == (14, 18)
    assert shown["tokens"]["draft_tokens"] == 7
    heading, *_, total = shown["csv"]
    assert (total[heading.index("draft_tokens")], total[heading.index("nvlink_bytes")]) == (7, 9)


def test_reports_need_neither_torch_nor_numpy():
    """Without them the command line starts in 0.2 s."""
    code = (
        "import sys\n"
        "from moebox import cli\n"
        "import moebox.commands.cost, moebox.cost.accounts, moebox.runtime.terminal.cost_text\n"
        "import moebox.cost.report.page, moebox.cost.report.text, moebox.cost.report.rows\n"
        "import moebox.cost.scenario.page, moebox.cost.scenario.text, moebox.cost.scenario.rows\n"
        "try:\n    cli.main_group(['cost', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy'} & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Say what tokens cost" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
