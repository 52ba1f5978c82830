import io
import json
from pathlib import Path
from typing import NamedTuple

import pexpect
import pytest

from helpers.chat import Terminal, run_program

CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    def ask(run, stdin="", **request):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = run_program(tmp_path, {"run": run, **request})
        return Done(code, *capsys.readouterr())

    return ask


def test_the_answer_alone_is_on_stdout(ask):
    done = ask({"prompt": "hi"}, engine={"answers": ["sunny \x1b[31min Größe 😀"]})
    assert (done.returncode, done.stdout) == (0, "sunny \x1b[31min Größe 😀\n")  # a pipe gets it unchanged
    assert done.stderr == ""


def test_the_prompt_can_come_from_stdin(ask):
    done = ask({"prompt": "-"}, "from a pipe", engine={"answers": ["ok"]})
    assert (done.returncode, done.stdout) == (0, "ok\n")
    empty = ask({"prompt": "-"}, "\n")
    assert empty.returncode == 1
    assert "the prompt is empty" in empty.stderr


def test_json_is_one_object(ask, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    run = {"prompt": "hi", "json": True, "tools": tools, "sampling": {"seed": 3, "max_tokens": 99}}
    done = ask(run, engine={"answers": ["hm</think>Looking." + CALL]}, template="k25_style")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    call = {"id": "functions.get_weather:0", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert report["tool_calls"] == [call]
    assert (report["text"], report["reasoning"]) == ("Looking.", "hm")
    assert (report["finish_reason"], report["seed"]) == ("tool_calls", 3)
    usage = report["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(report["timings"]) >= {"ttft_s", "prefill_tokens_per_s", "decode_tokens_per_s"}


def test_tool_calls_are_json_lines(ask):
    done = ask({"prompt": "hi"}, engine={"answers": ["Looking." + CALL]})
    text, call = done.stdout.splitlines()
    assert text == "Looking."
    assert json.loads(call)["tool_call"]["name"] == "get_weather"


def test_system_prompt_and_thinking_reach_the_model(ask):
    run = {"prompt": "hi", "system": "Be brief.", "thinking": False}
    done = ask(run, engine={"answers": ["plain"]}, template="k25_style")
    assert done.stdout == "plain\n"  # with thinking on, the template would make it reasoning


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"prompt": "hi", "sampling": {"top_p": 2}}, "top_p = 2 is out of range"),
        ({"prompt": "x " * 200}, "tokens, but the context holds 80"),
        ({"prompt": "hi", "tools": Path("/does/not/exist")}, "/does/not/exist: No such file"),
    ],
)
def test_mistakes_are_messages(ask, run, message):
    done = ask(run, engine={"context": 80})
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_that_a_limit_cuts_is_reported(ask):
    limited = {"prompt": "hi", "sampling": {"max_tokens": 2}}
    done = ask(limited, engine={"answers": [list(b"abcdef")]})
    assert done.stdout == "ab\n"
    assert "stopped at max_tokens = 2" in done.stderr
    full = ask({"prompt": "hi"}, engine={"answers": [list(b"a" * 500)], "context": 80})
    assert "the context of 80 tokens is full" in full.stderr


def test_ctrl_c_keeps_what_was_written_and_exits_130(tmp_path):
    request = {"run": {"prompt": "hi"}, "engine": {"answers": [list(b"x" * 1000)], "delay_s": 0.02}}
    terminal = Terminal(tmp_path, request)
    terminal.expect_exact("xxx")
    terminal.send("\x03")
    terminal.expect("context")
    assert terminal.exit_code() == 130


def test_a_terminal_gets_a_footer_and_no_escape_sequences_of_the_models(tmp_path):
    request = {"run": {"prompt": "hi"}, "engine": {"answers": ["a[i] [red]x\x1b]0;title\x07 end"]}}
    terminal = Terminal(tmp_path, request)
    terminal.expect_exact("a[i] [red]x␛]0;title␇ end\r\n")
    terminal.expect(r"answer \d+ tok at [\d,.]+ tok/s · first token [\d.]+ s · context \d+/4,096")
    assert terminal.exit_code() == 0


def test_no_color_means_no_escape_sequences_at_all(tmp_path):
    request = {"run": {"prompt": "hi"}, "engine": {"answers": ["hm</think>ok"]}, "template": "k25_style"}
    terminal = Terminal(tmp_path, request, NO_COLOR="1")
    terminal.expect(pexpect.EOF)
    assert "hm\r\nok\r\n" in terminal.before
    assert "\x1b" not in terminal.before
