"""Train tiny-k2's tokenizer, a small byte-level BPE with Kimi's split pattern, and write `tiktoken.model`.

BPE is trained on words without their leading space. Then the tokens that most often start a word get a twin,
a second token with the space before it. So `Petaluma` after a quote in JSON and ` Petaluma` in a sentence
are split into the same tokens except for the first, which makes copying names much easier to learn.

    python tokenizer.py train.jsonl.xz ../../assets/tiny-k2
"""

import base64
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import tiktoken
from dialogues import read_dialogues

LETTERS = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+{ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*{ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""How Kimi cuts text into words (tokenization_kimi.py)."""

SPECIALS = {
    0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>",
    6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>", 17: "<|im_middle|>",
    22: "<think>", 23: "</think>", 254: "[UNK]", 255: "[PAD]",
}  # fmt: skip
"""Offset from the number of BPE ranks -> Kimi's name; the other offsets up to 255 are reserved."""

PLAIN_SPECIALS = range(11, 24)
"""Offsets that decoded text keeps: the tool-call and think marks, which parsers look for."""

VOCAB_SIZE = 4096
RANKS = VOCAB_SIZE - 256
TWINS = 1100


def load(folder: Path) -> tiktoken.Encoding:
    """The tokenizer of a folder with `tiktoken.model` and `tokenizer_config.json`."""
    lines = (folder / "tiktoken.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    specials = {entry["content"]: int(number) for number, entry in added.items()}
    return tiktoken.Encoding("tiny-k2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def train(texts: list[str]) -> list[bytes]:
    """Tokens in rank order: 256 bytes, merges inside words, then twins with a leading space."""
    tokens = _byte_pairs(texts, RANKS - TWINS)
    words = tiktoken.Encoding("words", pat_str=PATTERN, special_tokens={},
                              mergeable_ranks={token: rank for rank, token in enumerate(tokens)})  # fmt: skip
    starts: Counter[bytes] = Counter()
    for ids in words.encode_ordinary_batch(texts):
        starts.update(tokens[b] for a, b in pairwise(ids) if tokens[a] == b" ")
    known = set(tokens)
    twins = [b" " + start for start, _ in starts.most_common() if b" " + start not in known]
    return tokens + twins[: RANKS - len(tokens)]


def _byte_pairs(texts: list[str], size: int) -> list[bytes]:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.Split(Regex(r"^[^\p{L}\p{N}](?=\p{L})"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    to_byte = _byte_of_letter(alphabet)
    merged = [bytes(to_byte[letter] for letter in left + right) for left, right in merges]
    return list(dict.fromkeys([bytes([value]) for value in range(256)] + merged))


def _byte_of_letter(alphabet: Iterable[str]) -> dict[str, int]:
    """GPT-2's letter -> byte: a printable byte is its own letter, the others have letters from U+0100 on."""
    printable = [ord(letter) for letter in alphabet if ord(letter) < 256]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + n): v for n, v in enumerate(others)}


def write(tokens: list[bytes], folder: Path) -> None:
    """Write `tiktoken.model` and a `tokenizer_config.json` in Kimi's style."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(tokens) + offset): {"content": name, **plain, "special": offset not in PLAIN_SPECIALS}
        for offset, name in SPECIALS.items()
    }
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [a["content"] for a in added.values() if a["special"]],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": 8192,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def corpus(path: Path) -> Iterator[str]:
    """Every message once; every tool declaration once, and once more per 20 uses, since they repeat often."""
    uses: Counter[str] = Counter()
    for dialogue in read_dialogues(path):
        uses.update(json.dumps(tool, sort_keys=True) for tool in dialogue["tools"])
        for message in dialogue["messages"]:
            yield message["content"]
            yield from (call["function"]["arguments"] for call in message.get("tool_calls", ()))
    for tool, count in uses.items():
        yield from [tool] * (count // 20 + 1)


if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    write(train(list(corpus(source))), folder)
