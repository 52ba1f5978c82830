import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.chat import SPECIALS, encode_answer, write_tokenizer
from moebox.runtime.text.output_parser import OutputParser, ThinkText, tool_name
from moebox.runtime.text.pieces import ToolCall
from moebox.runtime.text.stop_strings import partial_suffix
from moebox.runtime.text.tokenizer import Tokenizer

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def call(call_id, arguments):
    return f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("toolcalls")))


def parse_ids(tokenizer, ids, **options):
    parser = OutputParser(tokenizer, **options)
    pieces = [piece for token in ids for piece in parser.push(token)]
    return pieces + parser.finish()


def parse(tokenizer, text, **options):
    """Pairs (kind, text or call), with consecutive pieces of one kind joined, and the warnings."""
    joined, warnings = [], []
    for piece in parse_ids(tokenizer, encode_answer(tokenizer, text), **options):
        value = piece.tool_call or piece.text
        if joined and joined[-1][0] == piece.kind and piece.kind != "tool_call":
            joined[-1] = (piece.kind, joined[-1][1] + value)
        else:
            joined.append((piece.kind, value))
        if piece.warning:
            warnings.append(piece.warning)
    return joined, warnings


def test_text_alone(tokenizer):
    assert parse(tokenizer, "sunny in Größe 😀") == ([("text", "sunny in Größe 😀")], [])


def test_reasoning_then_text_then_calls(tokenizer):
    calls = call("functions.get_weather:0", '{"city": "Paris"}') + call("functions.get-it.now:1", "{}")
    text = f"<think>the city</think>Looking.{BEGIN}{calls}{END}"
    assert parse(tokenizer, text) == (
        [
            ("reasoning", "the city"),
            ("text", "Looking."),
            ("tool_call", ToolCall("functions.get_weather:0", "get_weather", '{"city": "Paris"}')),
            ("tool_call", ToolCall("functions.get-it.now:1", "get-it.now", "{}")),
        ],
        [],
    )


def test_the_prompt_already_opened_the_think_block(tokenizer):
    pieces, warnings = parse(tokenizer, "hm</think>ok", thinking_open=True)
    assert pieces == [("reasoning", "hm"), ("text", "ok")]
    assert not warnings
    assert parse(tokenizer, "</think>ok", thinking_open=True)[0] == [("text", "ok")]
    assert parse(tokenizer, "never closed", thinking_open=True)[0] == [("reasoning", "never closed")]


def test_a_call_ends_reasoning_that_was_not_closed(tokenizer):
    pieces, _ = parse(tokenizer, f"hm{BEGIN}{call('functions.f:0', '{}')}{END}ok", thinking_open=True)
    assert [kind for kind, _ in pieces] == ["reasoning", "tool_call", "text"]


def test_text_that_looks_like_tags_stays_text(tokenizer):
    text = f"<think>a</think>{BEGIN}{call('functions.f:0', '{}')}{END}<|im_end|>"
    pieces = parse_ids(tokenizer, tokenizer.encode(text))
    assert {piece.kind for piece in pieces} == {"text"}
    assert "".join(piece.text for piece in pieces) == text


def test_a_call_without_a_section(tokenizer):
    pieces, warnings = parse(tokenizer, f"a{call('functions.f:0', '{}')}b")
    assert [kind for kind, _ in pieces] == ["text", "tool_call", "text"]
    assert not warnings


@pytest.mark.parametrize(
    ("call_id", "name"),
    [
        ("functions.get_weather:0", "get_weather"),
        ("functions.a.b:12", "a.b"),
        ("functions.a-b:3", "a-b"),
        ("get_weather:0", "get_weather"),
        ("get_weather", "get_weather"),
        ("functions.f", "f"),
        ("", None),
        (":0", None),
        ("functions.two words:0", None),
    ],
)
def test_tool_names(call_id, name):
    assert tool_name(call_id) == name


def test_ids_without_a_number_get_the_next_one(tokenizer):
    text = BEGIN + call("get_weather", "{}") + call("functions.f:7", "{}") + call("g", "{}") + END
    pieces, _ = parse(tokenizer, text, next_index=3)
    assert [value.id for _, value in pieces] == ["functions.get_weather:3", "functions.f:7", "functions.g:8"]


def test_arguments_that_are_no_json_are_passed_on_with_a_warning(tokenizer):
    pieces, warnings = parse(tokenizer, BEGIN + call("functions.f:0", '{"a": ') + END)
    assert pieces == [("tool_call", ToolCall("functions.f:0", "f", '{"a": '))]
    assert "no JSON" in warnings[0]
    assert "no JSON object" in parse(tokenizer, BEGIN + call("functions.f:0", "[1]") + END)[1][0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"{BEGIN}chatter{END}", "text in a tool-call section"),
        (f"{BEGIN}<|tool_call_begin|>functions.f:0<|tool_call_end|>{END}", "no arguments"),
        (f"{BEGIN}{call('???', '{}')}{END}", "no tool name"),
        (f"{BEGIN}<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{{", "output ends inside"),
        (f"{BEGIN}<|tool_call_begin|>functions.f:0{END}", "section ends inside"),
        ("<|tool_call_end|>", "out of place"),
        ("</think>", "out of place"),
        ("<think>a<think>b", "out of place"),
    ],
)
def test_output_that_does_not_parse_is_text_with_a_warning(tokenizer, text, fault):
    pieces, warnings = parse(tokenizer, text)
    assert not any(kind == "tool_call" for kind, _ in pieces)
    assert fault in warnings[0]
    said = "".join(value for _, value in pieces)
    for tag in (BEGIN, END, "<think>"):  # the frame is not content
        text, said = text.replace(tag, ""), said.replace(tag, "")
    assert said == text


def test_text_between_calls_loses_no_call(tokenizer):
    text = BEGIN + call("functions.f:0", "{}") + " and \n" + call("functions.g:1", "{}") + "\n" + END + "done"
    pieces, warnings = parse(tokenizer, text)
    assert [kind for kind, _ in pieces] == ["tool_call", "text", "tool_call", "text"]
    assert pieces[1] == ("text", " and \n")
    assert warnings == ["text between tool calls"]


def test_a_call_without_its_end_tag_counts_where_its_arguments_are_complete(tokenizer):
    whole = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}'
    for rest in ("", END, call("functions.g:1", "{}") + END):
        pieces, _ = parse(tokenizer, BEGIN + whole + rest)
        assert pieces[0] == ("tool_call", ToolCall("functions.f:0", "f", '{"a": 1}'))


def test_other_control_tokens_show_as_text(tokenizer):
    assert parse(tokenizer, "a<|im_user|>b")[0] == [("text", "a<|im_user|>b")]


def test_think_tags_as_text_where_they_are_no_control_tokens(tmp_path):
    specials = {offset: name for offset, name in SPECIALS.items() if "think" not in name}
    plain = Tokenizer.load(write_tokenizer(tmp_path, specials))
    assert plain.special("<think>") is None
    text = f"\n<think>a < b</think>c <think>d{BEGIN}{call('functions.f:0', '{}')}{END}"
    pieces, _ = parse(plain, text, think_as_text=True)
    assert [kind for kind, _ in pieces] == ["reasoning", "text", "tool_call"]
    assert pieces[0][1] == "a < b"
    assert pieces[1][1] == "c <think>d"
    assert parse(plain, "x</think>y", thinking_open=True, think_as_text=True)[0] == [
        ("reasoning", "x"),
        ("text", "y"),
    ]
    assert parse(plain, "<thi", think_as_text=True)[0] == [("text", "<thi")]


def split(text, cuts):
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[begin:end] for begin, end in pairwise(edges)]


def think_text(chunks, is_open):
    filter_ = ThinkText(is_open)
    pieces = [piece for chunk in chunks for piece in filter_.push(chunk)] + filter_.leave()
    return tuple("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "text"))


tags = st.sampled_from(["<think>", "</think>", "<", "</thi", "a", " ", "\n"])
tagged = st.lists(tags, max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(tagged, st.lists(st.integers(0, 100), max_size=6), st.booleans())
def test_think_text_does_not_depend_on_chunking(text, cuts, is_open):
    assert think_text(split(text, cuts), is_open) == think_text([text], is_open)


FRAGMENTS = [*SPECIALS.values(), "functions.f:0", '{"a": 1}', "{}", "text", " ", "\n", "天", "😀"]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.booleans())
def test_no_output_is_lost_or_invented(tokenizer, fragments, is_open):
    text = "".join(fragments)
    whole = parse_ids(tokenizer, encode_answer(tokenizer, text), thinking_open=is_open)
    said = ""
    for piece in whole:
        said += piece.text
        if piece.tool_call:
            said += piece.tool_call.arguments
            assert json.dumps(piece.tool_call.to_message())
    frame = [name for name in SPECIALS.values() if "tool" in name or "think" in name]
    for tag in [*frame, "functions.f:0", " ", "\n"]:
        text, said = text.replace(tag, ""), said.replace(tag, "")
    assert said == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10))
def test_byte_by_byte_tokens_give_the_same_pieces(tokenizer, fragments):
    text = "".join(fragments)
    ids = encode_answer(tokenizer, text)
    single = []
    for token in ids:
        single += [token] if token in tokenizer.special_names else list(tokenizer.decode_bytes([token]))

    def summary(tokens):
        kinds = {"text": "", "reasoning": ""}
        pieces = parse_ids(tokenizer, tokens)
        for piece in pieces:
            if piece.kind in kinds:
                kinds[piece.kind] += piece.text
        return kinds, [piece.tool_call for piece in pieces if piece.tool_call]

    assert summary(single) == summary(ids)


def test_partial_suffix():
    assert partial_suffix("abc</th", "</think>") == 4
    assert partial_suffix("</think>", "</think>") == 0
    assert partial_suffix("", "x") == 0
