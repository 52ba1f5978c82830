import base64
import json

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from helpers.chat import SPECIALS, train_ranks, write_tokenizer
from moebox.errors import TokenizerError
from moebox.runtime.text import tokenizer as module
from moebox.runtime.text.tokenizer import PATTERN, Tokenizer, read_ranks

RANKS = train_ranks()
BASE = len(RANKS)

SAMPLES = [
    "",
    "Hello, world! It's 12345 o'clock",
    "I'LL DON'T we'Re iPhone XMLParser",
    "天气很好abc 天气 12天34",
    "не знаю, Größe größer Ångström ǅungla",
    " \n\n  \t\r\n x   \n",
    "😀👍🏽 e\u0301 \u200d \ufeff",
    "def f(x):\n\treturn x**2  # done\n\n\n",
    "a\u00a0b\u3000c",
    "<|im_end|>[EOS]<think>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' own conversion of tiktoken files to the `tokenizers` library."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(str(folder / "tiktoken.model"), pattern=PATTERN, extra_special_tokens=[])
    return converter.converted()


@pytest.mark.parametrize("text", SAMPLES)
def test_splits_as_the_regex_module_and_tokenizers_do(text):
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    expected = regex.findall(f"(?V1){PATTERN}", text)
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == expected
    assert "".join(expected) == text


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_a_split_never_joins_tokens_of_two_pieces(tokenizer, text):
    pieces = regex.findall(f"(?V1){PATTERN}", text)
    assert tokenizer.encode(text) == [token for piece in pieces for token in tokenizer.encode(piece)]


@pytest.mark.parametrize("text", SAMPLES)
def test_equals_transformers_conversion(tokenizer, reference, text):
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_equals_transformers_conversion_on_any_text(tokenizer, reference, text):
    assert isinstance(reference, FastTokenizer)
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(any_text, st.sampled_from(list(SPECIALS.values())))).map("".join))
def test_text_round_trips_and_never_gives_a_control_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens, default=0) < BASE


def test_specials_are_named_by_the_config_and_the_rest_reserved(tokenizer):
    assert tokenizer.special("<|im_end|>") == BASE + 2
    assert tokenizer.special(f"<|reserved_token_{BASE + 5}|>") == BASE + 5
    assert tokenizer.special("<|im_nothing|>") is None
    assert tokenizer.n_vocab == BASE + 256
    assert tokenizer.decode([BASE + 2, 104, 105]) == "<|im_end|>hi"


def test_no_id_beyond_the_vocabulary(folder, caplog):
    smaller = Tokenizer.load(folder, vocab_size=BASE + 20)
    assert max(smaller.special_names) == BASE + 19
    assert "<think>" not in smaller.specials
    assert "beyond the vocabulary" in caplog.text
    with pytest.raises(TokenizerError, match=str(BASE + 20)):
        smaller.decode([BASE + 20])


def test_a_vocabulary_smaller_than_the_ranks_is_refused(folder):
    with pytest.raises(TokenizerError, match=f"{BASE} tokens, but the model has vocab_size = 300"):
        Tokenizer.load(folder, vocab_size=300)


def test_long_runs_are_cut_where_kimi_cuts_them(tokenizer):
    run = "a" * 60_000 + " " * 25_000 + "b"
    parts = ["a" * 25_000, "a" * 25_000, "a" * 10_000 + " " * 25_000 + "b"]
    assert list(module._chunks(run)) == parts
    assert list(map(len, module._chunks("x y " * 200_000))) == [400_000, 400_000]
    assert tokenizer.decode(tokenizer.encode(run)) == run


def test_streaming_never_splits_a_character(tokenizer):
    text = "Größe 天 😀👍🏽 ok"
    stream = tokenizer.stream()
    pieces = [stream.push(byte) for byte in text.encode()]  # ids 0..255 are the single bytes
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_streaming_shows_a_character_cut_short_once(tokenizer):
    stream = tokenizer.stream()
    assert [stream.push(byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BASE + 255), max_size=30))
def test_streaming_equals_decoding_at_once(tokenizer, tokens):
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokens)) + stream.finish() == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["YQ== zero"], r"tiktoken\.model:1: 'YQ== zero' is not"),
        (["YQ== 0", "!!! 1"], r"tiktoken\.model:2: "),
        (["YQ== 0", "Yg== 2"], r"tiktoken\.model:2: rank 2 repeats or skips; expected 1"),
        (["YQ== 0", "YQ== 1"], r"tiktoken\.model:2: rank 1 repeats"),
        (["YQ== 0"], r"no token for byte 0x00"),
    ],
)
def test_a_broken_model_file_is_named_with_its_line(tmp_path, lines, message):
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    with pytest.raises(TokenizerError, match=message):
        read_ranks(tmp_path / "tiktoken.model")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: no such file"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: no such file"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"tokenizer_config\.json:1: not JSON"),
        ("[]", "holds a list"),
        ("{}", "no added_tokens_decoder"),
        (json.dumps({"added_tokens_decoder": {"x": {"content": "a"}}}), "has no id and content"),
        (json.dumps({"added_tokens_decoder": {"5": {"content": "a"}}}), "has id 5, which is a text token"),
        (
            json.dumps({"added_tokens_decoder": {str(BASE + i): {"content": "same"} for i in range(2)}}),
            "two ids share one name",
        ),
    ],
)
def test_a_broken_config_is_named(tmp_path, config, message):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


def test_ranks_read_back_as_written(folder):
    first = base64.b64decode((folder / "tiktoken.model").read_text().splitlines()[256].split()[0])
    ranks = read_ranks(folder / "tiktoken.model")
    assert ranks == RANKS
    assert ranks[first] == 256
