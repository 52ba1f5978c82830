"""The token ids of texts that the model generated, for prompts that repeat these texts."""

from __future__ import annotations

from moebox.runtime.text.tokenizer import Tokenizer

KEPT_TEXTS = 1024


class GeneratedTexts:
    """Texts of answers whose ids are not those that the tokenizer's `encode` chooses.

    The next prompt of a conversation repeats the answer as text. With the ids that were generated, it has the
    prefix that the cache holds.

    Attributes:
        ids: text -> ids; the last 1024 texts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: dict[str, list[int]] = {}
        self._tokenizer = tokenizer

    def add(self, tokens: list[int]) -> None:
        """Keep the texts between the control tokens of an answer."""
        text: list[int] = []
        for token in tokens:
            if token in self._tokenizer.special_names:
                self._add_text(text)
                text = []
            else:
                text.append(token)
        self._add_text(text)
        while len(self.ids) > KEPT_TEXTS:
            del self.ids[next(iter(self.ids))]

    def _add_text(self, tokens: list[int]) -> None:
        data = self._tokenizer.decode_bytes(tokens)
        text = data.decode("utf-8", errors="ignore")
        if text and text.encode("utf-8") == data and self._tokenizer.encode(text) != tokens:
            self.ids[text] = tokens
