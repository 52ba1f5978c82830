"""Lines and tables of reports."""

import io

from rich.console import Console

from moebox.console import percent, print_line, table_of, widen


def printed(show, width=40):
    console = Console(file=io.StringIO(), width=width)
    show(console)
    return console.file.getvalue()


def test_a_line_is_printed_as_it_is():
    text = "[bold] is no markup, and a line that is longer than the console is not broken"

    assert printed(lambda console: print_line(console, text)) == f"{text}\n"


def test_a_table_aligns_figures_to_the_right():
    table = table_of("layer", "ms")
    table.add_row("first", "1,234.5")
    table.add_row("second", "1.0")

    lines = printed(lambda console: console.print(table)).splitlines()

    assert lines[-2].split() == ["second", "1.0"]
    assert lines[-2].lstrip().startswith("second")
    assert lines[-3].rstrip().endswith("1,234.5")
    assert len(lines[-3].rstrip()) == len(lines[-2].rstrip())


def test_a_console_is_widened_and_never_narrowed():
    narrow, wide = Console(width=40), Console(width=200)
    for console in (narrow, wide):
        widen(console, 110)

    assert (narrow.width, wide.width) == (110, 200)


def test_shares_have_three_digits():
    assert [percent(share) for share in (0.05, 0.125, 0.33333, 1.0)] == ["5 %", "12.5 %", "33.3 %", "100 %"]
