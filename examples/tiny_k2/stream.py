"""Worker processes that make training batches: vary a dialogue, render it, pack it with others."""

import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from augment import Augmenter
from dialogues import ANSWER, NOTHING, Dialogue, Renderer, load_template, read_dialogues
from exercise import exercise
from thoughts import thinking_cut, with_system_prompt, without_tools
from tokenizer import load

Sequence = tuple[np.ndarray, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids uint16 [T], kinds uint8 [T], starts int32 [documents + 1]."""

MAX_DOCUMENT = 4096
EXERCISES = 0.15
"""Share of documents that are a single made-up request."""


class Sequences:
    """An endless supply of training sequences from one file of dialogues."""

    def __init__(self, data: Path, assets: Path, seed: int) -> None:
        self.dialogues = read_dialogues(data)
        self.augmenter = Augmenter(self.dialogues)
        self.renderer = Renderer(load_template(assets), load(assets))
        self.rng = random.Random(seed)
        self.numpy = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[Sequence]:
        while True:
            for dialogue in self.rng.sample(self.dialogues, len(self.dialogues)):
                yield self.sequence(self.augmenter.vary(dialogue, self.rng))

    def sequence(self, dialogue: Dialogue) -> Sequence:
        """A dialogue as it is, without tools, or up to a turn with a thought."""
        rng = self.rng
        if rng.random() < EXERCISES:
            return self.renderer.encode(exercise(self.augmenter, rng))
        if rng.random() < 0.04:
            dialogue = with_system_prompt(dialogue, rng)
        if rng.random() < 0.04:
            return self.renderer.encode(without_tools(dialogue))
        if rng.random() < 0.2:
            return self.renderer.encode(thinking_cut(dialogue, rng), think=True)
        return self.renderer.encode(dialogue)

    def copying(self) -> Sequence:
        """Random words, then the same words in another order: teaches to look back and copy."""
        words = [
            self.numpy.integers(256, 3840, n) for n in self.numpy.integers(2, 9, self.rng.randint(20, 60))
        ]
        again = self.numpy.permutation(len(words))
        ids = np.concatenate([*words, *(words[n] for n in again)]).astype(np.uint16)
        kinds = np.full(len(ids), NOTHING, np.uint8)
        kinds[sum(map(len, words)) :] = ANSWER
        return ids, kinds


def pack(sequences: Iterator[Sequence], tokens: int, documents: int) -> Iterator[Batch]:
    """Fill batches of exactly `tokens`; the last document of each is cut, missing documents are empty."""
    while True:
        ids, kinds = np.zeros(tokens, np.uint16), np.full(tokens, NOTHING, np.uint8)
        starts = np.full(documents + 1, tokens, np.int32)
        begin = 0
        for n in range(documents):
            starts[n] = begin
            one, kind = next(sequences)
            end = min(begin + len(one), begin + MAX_DOCUMENT, tokens)
            ids[begin:end], kinds[begin:end] = one[: end - begin], kind[: end - begin]
            begin = end
            if end == tokens:
                break
        yield ids, kinds, starts


def dev_batches(data: Path, assets: Path, tokens: int, limit: int | None = None) -> list[Batch]:
    """The dialogues of `data` as they are, none of them cut."""
    renderer = Renderer(load_template(assets), load(assets))
    batches: list[list[Sequence]] = [[]]
    for dialogue in read_dialogues(data)[:limit]:
        one = renderer.encode(dialogue)
        if sum(len(ids) for ids, _ in batches[-1]) + len(one[0]) > tokens:
            batches.append([])
        batches[-1].append(one)
    return [_joined(batch) for batch in batches]


def _joined(sequences: list[Sequence]) -> Batch:
    starts = np.cumsum([0, *(len(ids) for ids, _ in sequences)]).astype(np.int32)
    ids, kinds = (np.concatenate(column) for column in zip(*sequences, strict=True))
    return ids, kinds, starts


class Workers:
    """Processes that fill a queue with batches; the first `warm` of each are half copying exercises."""

    def __init__(
        self, processes: int, data: Path, assets: Path, tokens: int, seed: int = 0, warm: int = 0
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.queue = context.Queue(4 * processes)
        arguments = (self.queue, data, assets, tokens, warm)
        self.processes = [context.Process(target=_work, args=(*arguments, seed * 1000 + n), daemon=True)
                          for n in range(processes)]  # fmt: skip
        for process in self.processes:
            process.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.queue.get()

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()


def _work(queue: multiprocessing.Queue, data: Path, assets: Path, tokens: int, warm: int, seed: int) -> None:
    source = Sequences(data, assets, seed)
    dialogues, documents = iter(source), tokens // 256
    packed = pack(dialogues, tokens, documents)
    mixed = pack(
        (source.copying() if source.rng.random() < 0.6 else one for one in dialogues), tokens, documents
    )
    for _ in range(warm):
        queue.put(next(mixed))
    while True:
        queue.put(next(packed))
