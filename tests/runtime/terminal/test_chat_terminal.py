"""The real chat program on a terminal, driven key by key; only the engine is scripted."""

import subprocess
import sys

import pytest

from helpers.chat import Terminal, run_program
from moebox.runtime.terminal.input import LineReader

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
SLOW = {"answers": ["word " * 300, "short"], "delay_s": 0.01}
CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
)
FOOTER = r"prompt [\d,]+ tok \([\d,]+ cached\) at [\d,.]+ tok/s · answer [\d,]+ tok at [\d,.]+ tok/s · first"
SOURCE = r"(CPU|DRAM) [\d,.e-]+( est\.)?"
COST = (
    rf"[\d,.e-]+ J/token \({SOURCE}(, {SOURCE})?\) · \$[\d.]+/1M tokens, electricity only · "
    "experts 67 % RAM, 33 % disk"
)


@pytest.fixture
def open_chat(tmp_path):
    children = []

    def open_chat(chat=None, environment=None, **request):
        state = {"XDG_STATE_HOME": str(tmp_path / "state")} | (environment or {})
        terminal = Terminal(tmp_path / "model", {"chat": chat or {}, **request}, **state)
        children.append(terminal)
        terminal.expect("Ctrl-D leaves")
        terminal.expect_exact(">>>")
        return terminal

    yield open_chat
    for child in children:
        child.close()


def leave(terminal, at_prompt=False):
    if not at_prompt:
        terminal.expect_exact(">>>")
    terminal.send(CTRL_D)
    assert terminal.exit_code() == 0


def test_a_turn_with_its_footer_then_ctrl_d(open_chat):
    terminal = open_chat(engine={"answers": ["hello [bold]a[i][/bold] \x1b[31mred"]})
    terminal.send("hi\r")
    terminal.expect_exact("hello [bold]a[i][/bold] ␛[31mred\r\n")
    terminal.expect(FOOTER)
    terminal.expect(r"context [\d,]+/4,096")
    terminal.expect(COST)
    leave(terminal)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_keeps_the_session(open_chat):
    terminal = open_chat(engine=SLOW)
    terminal.send("go\r")
    terminal.expect("word word word")
    terminal.send(CTRL_C)
    terminal.expect("stopped; what was written so far is kept")
    terminal.expect_exact(">>>")
    terminal.send("again\r")
    terminal.expect_exact("short\r\n")
    leave(terminal)


@pytest.mark.slow
def test_the_partial_answer_is_kept_and_marked(open_chat, tmp_path):
    terminal = open_chat(engine=SLOW)
    terminal.send("go\r")
    terminal.expect("word word word")
    terminal.send(CTRL_C)
    terminal.expect_exact(">>>")
    path = tmp_path / "kept.json"
    terminal.send(f"/save {path}\r")
    terminal.expect("saved 2 messages")
    leave(terminal)
    text = path.read_text()
    assert '"interrupted": true' in text
    assert "word word word" in text


@pytest.mark.slow
def test_ctrl_c_during_the_prefill_keeps_the_text_at_the_prompt(open_chat):
    terminal = open_chat(engine={"prefill_delay_s": 3.0})
    terminal.send("a question\r")
    terminal.expect("reading the prompt")
    terminal.send(CTRL_C)
    terminal.expect("stopped before the answer began")
    terminal.expect_exact(">>>")
    terminal.expect_exact("a question")
    terminal.send(CTRL_C)  # clears the line
    leave(terminal, at_prompt=True)


def test_ctrl_c_at_the_prompt_clears_the_line(open_chat):
    terminal = open_chat()
    terminal.send("never sent")
    terminal.expect_exact("never sent")
    terminal.send(CTRL_C)
    terminal.send("/stats\r")
    terminal.expect(r"answers\s+0")
    terminal.expect_exact(">>>")
    terminal.send(CTRL_C)
    terminal.expect("Ctrl-D or /exit leaves")
    leave(terminal)


def test_triple_quotes_and_paste_keep_lines_together(open_chat, tmp_path):
    terminal = open_chat()
    terminal.send('"""one\r')
    terminal.expect_exact("...")
    terminal.send('two"""\r')
    terminal.expect_exact("ok\r\n")
    terminal.expect_exact(">>>")
    terminal.send("\x1b[200~three\rfour\x1b[201~")
    terminal.expect_exact("four")
    terminal.send("\r")
    terminal.expect_exact("ok\r\n")
    terminal.expect_exact(">>>")
    path = tmp_path / "lines.json"
    terminal.send(f"/save {path}\r")
    terminal.expect("saved 4 messages")
    leave(terminal)
    text = path.read_text()
    assert '"one\\ntwo"' in text
    assert '"three\\nfour"' in text


@pytest.mark.slow
def test_history_is_kept_in_a_file_of_the_user_alone(open_chat, tmp_path):
    first = open_chat()
    first.send("remember me\r")
    first.expect_exact("ok\r\n")
    leave(first)
    history = tmp_path / "state" / "moebox" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    second = open_chat()
    second.send(UP)
    second.expect_exact("remember me")
    second.send(CTRL_C)
    leave(second, at_prompt=True)


def test_a_tool_call_is_shown_and_its_result_typed(open_chat):
    terminal = open_chat(engine={"answers": ["Looking." + CALL, "It is sunny."]})
    terminal.send("weather?\r")
    terminal.expect_exact("Looking.")
    terminal.expect_exact('tool call get_weather {"city": "Paris"}')
    terminal.expect_exact("get_weather>")
    terminal.send('{"sky": "clear"}\r')
    terminal.expect_exact("It is sunny.")
    terminal.expect_exact(">>>")
    terminal.send(UP)  # tool results are not part of the history
    terminal.expect_exact("weather?")
    terminal.send(CTRL_C)
    leave(terminal, at_prompt=True)


def test_overflow_keeps_the_text_at_the_prompt(open_chat):
    terminal = open_chat(engine={"context": 80})
    terminal.send("long " * 40 + "\r")
    terminal.expect(r"error: the prompt has [\d,]+ tokens, but the context holds 80")
    terminal.expect("/clear starts a new conversation")
    terminal.expect_exact(">>>")
    terminal.expect_exact("long long long")
    terminal.send(CTRL_C)
    terminal.send("/exit\r")
    assert terminal.exit_code() == 0


def test_thinking_is_dimmed(open_chat):
    terminal = open_chat(template="k25_style", engine={"answers": ["hm</think>fine"]})
    terminal.send("hi\r")
    terminal.expect_exact("\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m\r\nfine\r\n")
    leave(terminal)


def test_no_color_leaves_the_answer_without_styles(open_chat):
    terminal = open_chat(
        template="k25_style", engine={"answers": ["hm</think>fine"]}, environment={"NO_COLOR": "1"}
    )
    terminal.send("hi\r")
    terminal.expect_exact("hm\r\nfine\r\n")
    terminal.expect(FOOTER)
    assert "\x1b[2m" not in terminal.before
    leave(terminal)


def test_a_pipe_works_line_by_line_without_escape_sequences(tmp_path, monkeypatch, capsys):
    lines = '/system Be brief.\nhi\n\n"""two\nlines"""\n/nope\n/stats'
    with (tmp_path / "input").open("w+") as stdin:
        stdin.write(lines)
        stdin.seek(0)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_program(tmp_path / "model", {"engine": {"answers": ["one", "two"]}}) == 0
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert "no command /nope" in err
    assert "\x1b" not in out + err
    assert ">>>" not in out + err


def test_an_unfinished_quote_at_the_end_of_a_pipe_is_sent(tmp_path, monkeypatch):
    with (tmp_path / "input").open("w+") as stdin:
        stdin.write('"""a\nb')
        stdin.seek(0)
        monkeypatch.setattr(sys, "stdin", stdin)
        reader = LineReader()
        assert reader.ask("") == "a\nb"
        with pytest.raises(EOFError):
            reader.ask("")


def test_starting_up_imports_neither_torch_nor_the_terminal_library():
    code = (
        "import sys, moebox.runtime.terminal.chat, moebox.runtime.terminal.run, moebox.runtime.api\n"
        "heavy = ('torch', 'prompt_toolkit', 'rich', 'jinja2', 'tiktoken')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
