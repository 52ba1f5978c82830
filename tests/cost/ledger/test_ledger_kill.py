"""kill -9 during 1,000 writes by 4 processes: no committed row is lost, and none is doubled."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from helpers.ledger import record
from helpers.paths import TESTS
from moebox.cost.ledger.ledger import Ledger

PROCESSES, ROWS = 4, 250

ROW_BY_ROW = """
import sys
from pathlib import Path
from helpers.ledger import record
from moebox.cost.ledger.ledger import Ledger

path, name, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Ledger.open(path) as ledger:
    for number in range(rows):
        ledger.add(record(f"{name} {number}"))
        print(f"{name} {number}", flush=True)
"""
BY_THE_THREAD = """
import sys
from pathlib import Path
from helpers.ledger import record
from moebox.cost.ledger.writer import LedgerWriter

path, name, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
writer = LedgerWriter(path)
for number in range(rows):
    writer.put(record(f"{name} {number}"))
    if number % 5 == 4 and writer.flush():
        print("\\n".join(f"{name} {number - i}" for i in range(5)), flush=True)
"""


def start(program, path, name):
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", program, str(path), name, str(ROWS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def committed(processes, kill_after):
    """Ids that the processes reported as written; all processes are killed after `kill_after` reports."""
    ids, enough = [], threading.Event()

    def read(process):
        for line in process.stdout:
            ids.append(line.strip())
            if len(ids) >= kill_after:
                enough.set()

    threads = [threading.Thread(target=read, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    assert enough.wait(60)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for thread, process in zip(threads, processes, strict=True):
        thread.join()
        process.wait()
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("program", [ROW_BY_ROW, BY_THE_THREAD], ids=["row by row", "by the thread"])
@pytest.mark.parametrize("kill_after", [1, 400])
def test_kill_9_loses_no_committed_row_and_doubles_none(tmp_path, program, kill_after):
    path = tmp_path / "ledger.sqlite3"
    written = committed([start(program, path, str(i)) for i in range(PROCESSES)], kill_after)
    with Ledger.open(path, read_only=True) as ledger:
        found = [row.id for row in ledger.requests()]
        assert ledger.totals()[0].requests == len(found)
    assert set(written) <= set(found)
    assert len(found) == len(set(found)) < PROCESSES * ROWS
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_all_rows_written_again_after_the_kill_are_there_once(tmp_path):
    path = tmp_path / "ledger.sqlite3"
    committed([start(ROW_BY_ROW, path, str(i)) for i in range(PROCESSES)], kill_after=300)
    with Ledger.open(path) as ledger:
        for name in range(PROCESSES):
            ledger.add(*(record(f"{name} {number}") for number in range(ROWS)))
        assert ledger.totals()[0].requests == PROCESSES * ROWS
        assert {row.usage.prompt_tokens for row in ledger.requests()} == {100}
