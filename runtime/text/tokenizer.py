"""Kimi's tokenizer without remote code: `tiktoken.model`, the family's split pattern, special tokens.

`tiktoken.model` has one line `base64(token bytes) SP rank` for each token. The ids of control tokens follow
the last rank; their names stand in `tokenizer_config.json`. `encode` returns no control tokens, so that text
which a user types cannot contain one.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.errors import TokenizerError

if TYPE_CHECKING:
    import tiktoken

logger = logging.getLogger("moebox")

MODEL_FILE = "tiktoken.model"
CONFIG_FILE = "tokenizer_config.json"
RESERVED_SPECIALS = 256
"""Ids of control tokens after the last BPE rank, where the embedding's size is not known."""

PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
"""`pat_str` of tokenization_kimi.py. Needs set intersection (`&&`): Python's `re` cannot read it."""

# tokenization_kimi.py cuts its input at these lengths, since the regex engine recurses on long runs of
# characters. A cut can change the tokens, so the same cuts are made here.
_MAX_CHARS = 400_000
_MAX_RUN_CHARS = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN_CHARS + 1},}}|\S{{{_MAX_RUN_CHARS + 1},}}")


class Tokenizer:
    """Byte-level BPE with control tokens.

    Args:
        ranks: token's bytes -> id.
        specials: control token's name -> id.

    Attributes:
        specials: as given.
        special_names: control token's id -> name.
        n_vocab: tokens of both kinds.
    """

    def __init__(self, ranks: dict[bytes, int], specials: dict[str, int]) -> None:
        import tiktoken

        self.specials = specials
        self.special_names = {token: name for name, token in specials.items()}
        self.n_vocab = len(ranks) + len(specials)
        self._encoding: tiktoken.Encoding = tiktoken.Encoding(
            "kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )

    @classmethod
    def load(cls, folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """Read `tiktoken.model` and `tokenizer_config.json` from a checkpoint folder.

        Args:
            folder: the checkpoint.
            vocab_size: rows of the embedding; ids from there on are left out.

        Raises:
            TokenizerError: a file is missing or wrong; names the file and the line.
        """
        ranks = read_ranks(folder / MODEL_FILE)
        end = len(ranks) + RESERVED_SPECIALS if vocab_size is None else vocab_size
        if end < len(ranks):
            raise TokenizerError(
                f"{folder / MODEL_FILE}: {len(ranks)} tokens, but the model has vocab_size = {end}",
                "The tokenizer belongs to another checkpoint; copy the one of this model.",
            )
        return cls(ranks, _special_tokens(folder / CONFIG_FILE, len(ranks), end))

    def special(self, name: str) -> int | None:
        """Id of a control token such as `<|im_end|>`; None where this model has no such token."""
        return self.specials.get(name)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; a control token's name in `text` becomes ordinary tokens."""
        tokens: list[int] = []
        for chunk in _chunks(text):
            tokens += self._encoding.encode_ordinary(chunk)
        return tokens

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Bytes of `tokens`, with control tokens as their names; they may end inside a character.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        ids = list(tokens)
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            bad = next(token for token in ids if not 0 <= token < self.n_vocab)
            raise TokenizerError(f"token {bad} is not in the vocabulary of {self.n_vocab}") from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for tokens that arrive one at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes tokens that arrive one at a time, and holds a character back until its last byte arrives."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        """U+FFFD where the last character is incomplete, else an empty string."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a `tiktoken.model`.

    Returns:
        Token's bytes -> id, with the ids 0..n-1; each of the 256 bytes is a token.

    Raises:
        TokenizerError: the file is missing or wrong; names the file and the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise TokenizerError(
            f"{path}: no such file",
            "moebox reads Kimi's tiktoken.model; copy it and tokenizer_config.json from the model's page.",
        ) from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if line:
            token, rank = _parse_line(line, f"{path}:{number}")
            if token in ranks or rank != len(ranks):
                raise TokenizerError(f"{path}:{number}: rank {rank} repeats or skips; expected {len(ranks)}")
            ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: no token for byte 0x{missing[0]:02x}", "The file is cut short.")
    return ranks


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        return base64.b64decode(encoded, validate=True), int(rank)
    except (ValueError, binascii.Error):
        shown = line[:60].decode("utf-8", errors="replace")
        raise TokenizerError(f"{where}: {shown!r} is not `base64 rank`", "Fetch the file again.") from None


def _special_tokens(path: Path, start: int, end: int) -> dict[str, int]:
    """Names of the ids start..end-1: from `added_tokens_decoder`, else `<|reserved_token_{id}|>`."""
    names = {token: f"<|reserved_token_{token}|>" for token in range(start, end)}
    for token, name in _added_tokens(path):
        if token < start:
            raise TokenizerError(f"{path}: {name!r} has id {token}, which is a text token (0..{start - 1})")
        if token >= end:
            logger.warning("%s: %r has id %d, beyond the vocabulary of %d: ignored", path, name, token, end)
            continue
        names[token] = name
    specials = {name: token for token, name in names.items()}
    if len(specials) != len(names):
        raise TokenizerError(f"{path}: two ids share one name in added_tokens_decoder")
    return specials


def _added_tokens(path: Path) -> Iterator[tuple[int, str]]:
    config = read_tokenizer_config(path)
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: no added_tokens_decoder, which names the control tokens")
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not key.isdecimal() or not isinstance(content, str) or not content:
            raise TokenizerError(f"{path}: added_tokens_decoder[{key!r}] = {entry!r} has no id and content")
        yield int(key), content


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """The JSON object in `tokenizer_config.json`.

    Raises:
        TokenizerError: the file is missing or holds no JSON object; names the file, and a line.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file", "It names the model's control tokens.") from None
    except json.JSONDecodeError as error:
        raise TokenizerError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


def _chunks(text: str) -> Iterator[str]:
    """`text`, cut as tokenization_kimi.py cuts it."""
    for start in range(0, len(text), _MAX_CHARS):
        part = text[start : start + _MAX_CHARS]
        cuts = [
            cut
            for run in _LONG_RUN.finditer(part)
            for cut in range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS)
        ]
        for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
            yield part[begin:end]
