"""A tiny Kimi tokenizer, an engine that answers from a script, and a chat program around both."""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import multiprocessing
import os
import pty
import re
import struct
import sys
import termios
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pexpect import EOF
from pexpect.fdpexpect import fdspawn

from helpers.paths import TESTS
from moebox.cost.accounts import Accounts
from moebox.cost.prices.box_prices import load_prices
from moebox.errors import MoeboxError, RequestError
from moebox.offload.traffic import Traffic
from moebox.runtime.api import Model
from moebox.runtime.terminal import chat, run
from moebox.runtime.terminal.chat import ChatOptions
from moebox.runtime.terminal.run import RunOptions
from moebox.runtime.text.template import Template
from moebox.runtime.text.tokenizer import Tokenizer

TEMPLATES = TESTS / "data" / "templates"

SPECIALS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    22: "<think>",
    23: "</think>",
}
"""Kimi K2.5's control tokens, counted from the last text token."""

CORPUS = (
    "the weather in Paris is sunny and the answer is that it's fine, isn't it? "
    "You are Kimi, an AI assistant created by Moonshot AI. functions.get_weather:0 "
    '{"city": "Paris", "days": 12345} user assistant system tool ## Return of '
    "Größe größer 天气很好 天气 не знаю 😀😀 \n\n    def main(): return 0\n"
) * 3


def train_ranks(text: str = CORPUS, merges: int = 300) -> dict[bytes, int]:
    """Byte-pair merges of `text`, most frequent first: token bytes -> rank."""
    words = [[bytes([byte]) for byte in word.encode()] for word in text.replace(" ", " \0").split("\0")]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(merges):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        words = [_merge(word, best) for word in words]
    return ranks


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def write_tokenizer(
    folder: Path, specials: dict[int, str] | None = None, template: str | None = "k2_style"
) -> Path:
    """Write a checkpoint's tokenizer files; `specials` by offset from the last text token."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = train_ranks()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    named = SPECIALS if specials is None else specials
    decoder = {str(len(ranks) + offset): {"content": name, "special": True} for offset, name in named.items()}
    config = {"added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return folder


@dataclass
class FakeSession:
    """Has the interface of `engine.Session`; answers from the engine's script."""

    engine: FakeEngine
    context: int
    tokens: list[int] = field(default_factory=list)
    reused: int = 0
    computed: int = 0
    pending: list[int] = field(default_factory=list)

    def prefill(self, token_ids, *, on_progress=None, cancel=None):
        if len(token_ids) > self.context:
            raise RequestError(f"{len(token_ids)} tokens do not fit the context of {self.context}")
        shared = 0
        while shared < min(len(self.tokens), len(token_ids)) and self.tokens[shared] == token_ids[shared]:
            shared += 1
        self.reused = min(shared, len(token_ids) - 1)
        self.computed = len(token_ids) - self.reused
        self.engine.prefills.append((self.reused, self.computed))
        self.engine.passes += 1
        for step in range(4):
            if cancel is not None and cancel.is_set():
                raise MoeboxError("the prefill was cancelled")
            time.sleep(self.engine.prefill_delay_s / 4)
            if on_progress is not None:
                on_progress(self.computed * (step + 1) // 4, self.computed)
        self.tokens = list(token_ids)
        self.pending = self.engine.next_answer(token_ids)
        return self._logits()

    def decode(self, token):
        time.sleep(self.engine.delay_s)
        if len(self.tokens) >= self.context:
            raise RequestError("the context is full")
        self.tokens.append(token)
        self.engine.passes += 1
        return self._logits()

    def _logits(self):
        logits = torch.full((self.engine.config.vocab_size,), -20.0)
        logits[self.pending.pop(0) if self.pending else self.engine.end] = 20.0
        return logits


class FakeEngine:
    """Has the interface of `engine.Engine`: answer number i is `answers[i]`, and the last one repeats.

    An answer is text in which control tokens may be named, or a list of token ids.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        answers: Sequence[str | list[int]] = ("ok",),
        context: int = 4096,
        delay_s: float = 0.0,
        prefill_delay_s: float = 0.0,
    ) -> None:
        self.folder = folder
        eos = tokenizer.specials["[EOS]"]
        self.config = SimpleNamespace(vocab_size=tokenizer.n_vocab, eos_token_ids=(eos,))
        self.context = context
        self.delay_s = delay_s
        self.prefill_delay_s = prefill_delay_s
        self.end = tokenizer.special("<|im_end|>")
        self.prefills: list[tuple[int, int]] = []
        self.prompts: list[list[int]] = []
        self.passes = 0
        self._tokenizer = tokenizer
        self._answers = list(answers)

    device = torch.device("cpu")

    def traffic(self) -> Traffic:
        """As if each pass used two experts in RAM and one on disk, of 1,000 bytes."""
        n = self.passes
        return Traffic(ram_hits=2 * n, disk_hits=n, cpu_bytes=3000 * n, disk_bytes=1000 * n)

    def session(self, context: int | None = None) -> FakeSession:
        return FakeSession(self, context or self.context)

    def close(self) -> None:
        """Nothing is open."""

    def logits(self, token_ids):
        return torch.zeros(len(token_ids), self.config.vocab_size)

    def next_answer(self, prompt: list[int]) -> list[int]:
        self.prompts.append(list(prompt))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return encode_answer(self._tokenizer, answer) if isinstance(answer, str) else list(answer)


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text` with control tokens recognised, as a model would generate them."""
    return tokenizer._encoding.encode(text, allowed_special="all")


def fake_model(
    folder: Path,
    template: str | None = "k2_style",
    ledger: bool = False,
    user: str | None = None,
    **options,
) -> Model:
    """A `Model` over a tiny tokenizer and a scripted engine."""
    write_tokenizer(folder, template=template)
    tokenizer = Tokenizer.load(folder)
    engine = FakeEngine(folder, tokenizer, **options)
    accounts = Accounts.open(engine.device, load_prices(), ledger=ledger)
    return Model(engine, tokenizer, Template.load(folder, tokenizer), accounts, user)


def run_program(folder: Path, request: dict) -> int:
    """The real chat or run program on a scripted engine: `{"chat" | "run": options, "engine": options}`."""
    model = fake_model(folder, request.get("template", "k2_style"), **request.get("engine", {}))
    try:
        if "run" in request:
            return run.main(model, RunOptions(**request["run"]))
        return chat.main(model, ChatOptions(**request.get("chat", {})))
    except MoeboxError as error:
        print(f"moebox: {error}", file=sys.stderr)
        return 1


# Not a fork of pytest itself: torch's threads do not survive a fork, and their successors would wait for
# them. The server imports torch once and never computes.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["helpers.chat", "moebox.runtime.terminal.chat", "moebox.runtime.terminal.run", "torch"]
)


class Terminal(fdspawn):
    """`run_program` in a child with a terminal of its own, driven as pexpect drives programs."""

    def __init__(self, folder: Path, request: dict, **environment: str) -> None:
        master, slave = pty.openpty()
        opened = _FORKS.Event()
        arguments = (os.ttyname(slave), opened, folder, request, environment)
        self.process = _FORKS.Process(target=_child, args=arguments)
        self.process.start()
        opened.wait(60)
        os.close(slave)
        super().__init__(master, encoding="utf-8", timeout=30)

    def exit_code(self) -> int:
        """Wait for the end of the program."""
        self.expect(EOF)
        self.process.join(30)
        return self.process.exitcode

    def plain(self) -> str:
        """What was shown before the last match, without escape sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.before)


def _child(tty: str, opened: Any, folder: Path, request: dict, environment: dict[str, str]) -> None:
    os.setsid()  # the terminal that is opened next controls this process: Ctrl-C reaches it
    terminal = os.open(tty, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(terminal, fd)
    os.close(terminal)
    opened.set()
    os.environ.update({"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | environment)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    logging.getLogger("moebox").handlers = [logging.StreamHandler(sys.stderr)]
    try:
        code = run_program(folder, request)
    except BaseException:  # noqa: BLE001 - the child must never return into pytest
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
