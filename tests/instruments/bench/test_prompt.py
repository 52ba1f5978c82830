"""The benchmark's prompt: one fixed text, whatever the commit."""

import hashlib

from helpers.paths import TINY_K2
from moebox.config import load_config
from moebox.instruments.bench.prompt import prompt_text, random_ids, text_ids
from moebox.runtime.text.tokenizer import Tokenizer

SHA256 = "bdda3488e5106d02d260b0d8005bb7fdbdaa43f348bfd97018306974f61102a9"
"""A change of the text ends the comparability of all figures of checkpoints that were measured before it."""
VOCABULARY = load_config(TINY_K2).vocab_size


def test_text_is_unchanged():
    assert hashlib.sha256(prompt_text().encode()).hexdigest() == SHA256


def test_prompt_is_the_text_repeated_when_more_tokens_are_needed():
    whole = Tokenizer.load(TINY_K2, VOCABULARY).encode(prompt_text())

    assert text_ids(TINY_K2, VOCABULARY, 100) == whole[:100]
    assert text_ids(TINY_K2, VOCABULARY, len(whole) + 7) == whole + whole[:7]
    assert Tokenizer.load(TINY_K2, VOCABULARY).decode(whole) == prompt_text()


def test_random_ids_are_the_same_in_every_run():
    ids = random_ids(1000, 50)

    assert ids == random_ids(1000, 50)
    assert len(set(ids)) > 40
    assert all(0 <= one < 1000 for one in ids)
