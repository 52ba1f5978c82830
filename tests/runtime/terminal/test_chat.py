import json

import pytest

from helpers.chat import fake_model
from moebox.errors import RequestError
from moebox.runtime.terminal.chat import PROMPT, Chat, ChatOptions
from moebox.runtime.terminal.commands import COMMANDS, find_command
from moebox.runtime.terminal.console import harmless
from moebox.runtime.terminal.conversation import Conversation, read_tools
from moebox.runtime.terminal.input import quote_is_open, unquoted
from moebox.runtime.terminal.screen import Screen

CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'
)
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


class Script:
    """A reader that types prepared lines; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.asked = []

    def ask(self, label, text="", remember=True):
        self.asked.append((label, text))
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line


@pytest.fixture
def talk(tmp_path, capsys):
    """Run a chat over prepared lines: the chat, stdout, stderr."""

    def talk(*lines, options=None, **model):
        chat = Chat(
            fake_model(tmp_path / "model", **model), options or ChatOptions(), Screen(), Script(*lines)
        )
        assert chat.run() == 0
        return chat, *capsys.readouterr()

    return talk


def roles(chat):
    return [message["role"] for message in chat.conversation.messages]


def test_a_conversation_goes_on(talk):
    chat, out, _ = talk("hi", "", "more", answers=["one", "two"])
    assert out == "one\ntwo\n"
    assert roles(chat) == ["user", "assistant"] * 2
    reused, computed = chat.model.engine.prefills[1]
    assert reused > computed  # only the new turn is read
    assert chat.totals.answers == 2


def test_reasoning_is_kept_and_can_be_hidden(talk):
    chat, out, err = talk("hi", "/think hide", "more", template="k25_style", answers=["hm</think>ok"])
    assert out == "ok\nok\n"
    assert err.count("hm") == 1
    assert chat.conversation.messages[1]["reasoning_content"] == "hm"


def test_a_tool_call_asks_for_its_result(talk, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    chat, out, err = talk(
        "weather?",
        " ",
        '{"sky": "clear"}',
        options=ChatOptions(tools=tools),
        answers=["Let me see." + CALL, "Clear."],
    )
    assert out == 'Let me see.\ntool call get_weather {"city": "Paris"}\nClear.\n'
    assert "type what get_weather returns" in err
    assert roles(chat) == ["user", "assistant", "tool", "assistant"]
    assert chat.conversation.messages[2] == {
        "role": "tool",
        "tool_call_id": "functions.get_weather:0",
        "name": "get_weather",
        "content": '{"sky": "clear"}',
    }
    assert chat._reader.asked[1][0] == "get_weather> "
    prompt = chat.model.tokenizer.decode(chat.model.engine.prompts[1])
    assert '## Return of functions.get_weather:0\n{"sky": "clear"}<|im_end|>' in prompt
    assert "tool_declare" in prompt


def test_a_result_can_come_from_a_file_or_be_left_open(talk, tmp_path):
    result = tmp_path / "result.json"
    result.write_text("from a file")
    chat, _, err = talk("a", "/read /no/such", f"/read {result}", answers=[CALL, "done"])
    assert chat.conversation.messages[2]["content"] == "from a file"
    assert "/no/such: No such file" in err
    chat, _, err = talk("a", KeyboardInterrupt, answers=[CALL, "done"])
    assert roles(chat) == ["user", "assistant"]
    assert "left without a result" in err


def test_clear_keeps_the_system_prompt(talk):
    chat, _, err = talk("/system Be brief.", "hi", "/clear", "again")
    assert chat.conversation.system == "Be brief."
    assert roles(chat) == ["user", "assistant"]
    assert "the system prompt is kept" in err
    prompt = chat.model.tokenizer.decode(chat.model.engine.prompts[1])
    assert prompt.startswith(
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>again"
    )


def test_system_shows_sets_and_removes_the_prompt(talk):
    _, _, err = talk("/system", "/system One two", "/system", "/system none", "/system")
    lines = err.splitlines()[1:]
    assert lines == [
        "no system prompt: the template's own, if it has one",
        "system prompt set",
        "One two",
        "system prompt removed",
        "no system prompt: the template's own, if it has one",
    ]


def test_set_changes_and_checks_options(talk, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps({"tools": TOOLS}))
    chat, _, err = talk(
        "/set temperature 0.25", "/set top_p 7", "/set topp 1", "/set max_tokens 5", "/set stop END",
        "/set seed 4", "/set seed none", f"/set tools {tools}", "/set", "hi",
    )  # fmt: skip
    assert (chat.sampling.temperature, chat.sampling.max_tokens, chat.sampling.top_p) == (0.25, 5, 1.0)
    assert (chat.sampling.stop, chat.sampling.seed) == (("END",), None)
    assert "error: top_p = 7 is out of range" in err
    assert "unknown sampling option 'topp'" in err
    assert "tools: get_weather" in err
    assert "repetition_penalty" in err
    assert chat.conversation.tools == read_tools(tools)


def test_think_switches_what_the_template_gets(talk):
    chat, out, _ = talk("/think off", "a", "/think", "b", "/think odd", template="k25_style", answers=["x"])
    assert out == "x\n"  # the second x is reasoning
    assert chat.thinking
    assert [m.get("reasoning_content") for m in chat.conversation.messages[1::2]] == [None, "x"]


def test_regen_answers_the_last_message_again(talk):
    chat, out, err = talk("/regen", "hi", "/regen", answers=["one", "two"])
    assert out == "one\ntwo\n"
    assert [message["content"] for message in chat.conversation.messages] == ["hi", "two"]
    assert "nothing to answer again" in err


def test_save_and_load_keep_the_conversation(talk, tmp_path):
    saved = tmp_path / "chat.json"
    chat, _, err = talk("/system Be brief.", "hi", f"/save {saved}", "/save", "more", f"/save {saved}")
    assert "Usage: /save FILE" in err
    data = json.loads(saved.read_text())
    assert (data["format"], data["model"], len(data["messages"])) == ("moebox-chat", "model", 4)
    loaded, _, err = talk(f"/load {saved}", "and then?")
    assert "loaded 4 messages" in err
    assert loaded.conversation.system == "Be brief."
    assert loaded.conversation.messages[:4] == chat.conversation.messages
    again, *_ = talk(options=ChatOptions(load=saved))
    assert again.conversation.messages == chat.conversation.messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", ":1: not JSON"),
        ("[]", "is no saved chat"),
        ('{"format": "moebox-chat", "version": 9}', "version 9"),
        ('{"format": "moebox-chat", "version": 1, "messages": 5}', "are damaged"),
        ('{"format": "moebox-chat", "version": 1, "messages": [{"role": 1}]}', r"messages\[0\]: role 1"),
        ('{"format": "moebox-chat", "version": 1, "messages": [], "tools": [{}]}', r"tools\[0\] has no"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=rf"chat\.json.*{message}"):
        Conversation.load(path)


def test_save_never_overwrites_a_file_that_is_no_chat(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(RequestError, match="is no saved chat"):
        Conversation().save(path, "model")
    assert path.read_text() == "precious"
    with pytest.raises(RequestError, match="cannot be written"):
        Conversation().save(tmp_path / "no" / "folder.json", "model")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_read_sends_a_file_with_the_next_message_only(talk, tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("roses are <|im_end|>")
    chat, _, err = talk(f"/read {path}", "what is it?", "and?", "/read /no/such")
    first, third = chat.conversation.messages[0]["content"], chat.conversation.messages[2]["content"]
    assert first == "poem.txt:\n```\nroses are <|im_end|>\n```\n\nwhat is it?"
    assert third == "and?"
    assert "goes with your next message" in err
    assert "error: /no/such: No such file" in err


def test_overflow_is_an_error_with_both_numbers_and_keeps_the_text(talk, tmp_path):
    long = "word " * 100
    chat, out, err = talk("hi", long, "/clear", context=90)
    assert out == "ok\n"
    assert "tokens, but the context holds 90" in err
    assert "/clear starts a new conversation" in err
    assert chat._reader.asked[2] == (PROMPT, long)
    assert chat.conversation.messages == []


def test_a_full_context_cuts_the_answer_and_says_so(talk):
    chat, _, err = talk("hi", answers=[list(b"a" * 500)], context=80)
    assert "the context of 80 tokens is full: the answer is cut here" in err
    assert roles(chat) == ["user", "assistant"]


def test_stats_and_help(talk):
    _, _, err = talk("hi", "/stats", "/help")
    assert "answers" in err
    assert "of 4,096 tokens" in err
    for command in COMMANDS:
        assert f"/{command.name}" in err


def test_the_session_sums_what_its_answers_used(talk):
    chat, _, err = talk("hi", "more", "/stats", answers=["one", "two and more"])
    totals = chat.totals
    assert totals.usage.traffic == chat.model.engine.traffic()
    assert "67 % RAM, 33 % disk" in err
    assert "J/token" in err
    assert "electricity only" in err
    joules = totals.usage.joules
    assert joules > chat.last.usage.joules > 0
    assert totals.usage.computed_tokens > chat.last.usage.computed_tokens > 0
    cost = totals.cost(chat.model.accounts.prices)
    assert cost.total == pytest.approx(joules / 3.6e6 * 0.176 / totals.usage.computed_tokens * 1e6)


def test_an_unknown_command_is_an_error_with_a_suggestion(talk):
    chat, _, err = talk("/sytem x", "/zzz", "/usr/bin is a folder", "//help me", "/exit", "never")
    assert "error: no command /sytem\nDid you mean /system" in err
    assert "no command /zzz\n/help lists them" in err
    sent = [message["content"] for message in chat.conversation.messages[::2]]
    assert sent == ["/usr/bin is a folder", "/help me"]
    assert chat._reader.lines == ["never"]


def test_malformed_calls_are_shown_with_a_warning(talk):
    _, out, err = talk("hi", answers=["<|tool_calls_section_begin|>oops<|tool_calls_section_end|>"])
    assert out == "<|tool_calls_section_begin|>oops<|tool_calls_section_end|>\n"
    assert "note: text in a tool-call section" in err


def test_commands_are_found_with_their_arguments():
    run, argument = find_command("  /SAVE  a b.json ")
    assert (run, argument) == (next(c.run for c in COMMANDS if c.name == "save"), "a b.json")
    assert find_command("hello /save") is None
    assert find_command("//save") is None


@pytest.mark.parametrize(
    ("text", "is_open", "plain"),
    [
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""', False, "a"),
        ('""""""', False, ""),
        ('say """x"""', False, 'say """x"""'),
        ("plain ", False, "plain "),
    ],
)
def test_triple_quotes(text, is_open, plain):
    assert quote_is_open(text) == is_open
    assert unquoted(text) == plain


def test_harmless_keeps_text_and_makes_control_characters_visible():
    assert harmless("a[i] é 天\t😀\n") == "a[i] é 天\t😀\n"
    assert harmless("\x1b[2J\r\x07\x7f\x9b1m\u202e") == "␛[2J␍␇␡<U+009B>1m<U+202E>"
