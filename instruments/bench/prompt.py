"""The benchmark's prompt: one fixed text for checkpoints, so that figures compare across commits."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

SEED = 0
"""Of the random ids that random weights are given, and of the benchmark's synthetic trace."""


def prompt_text() -> str:
    """`assets/bench_prompt.txt`: prose, tables, code, numbers and other languages, 24 kB of UTF-8."""
    return (files("moebox") / "assets" / "bench_prompt.txt").read_text("utf-8")


def text_ids(model: Path, vocab_size: int, count: int) -> list[int]:
    """The first `count` token ids of the fixed text, repeated as often as needed, by the model's tokenizer.

    Raises:
        CheckpointError: the tokenizer is missing or broken.
    """
    from moebox.runtime.text.tokenizer import Tokenizer  # random weights need none

    ids = Tokenizer.load(model, vocab_size).encode(prompt_text())
    return (ids * (count // len(ids) + 1))[:count]


def random_ids(vocab_size: int, count: int) -> list[int]:
    """`count` random token ids, the same in every run."""
    ids: list[int] = np.random.default_rng(SEED).integers(0, vocab_size, count).tolist()
    return ids
