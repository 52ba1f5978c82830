"""What hosted models cost: the data that `genai-prices` brings along, and a user's own file over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ApiPrice:
    """List price of a hosted model, per million tokens.

    Attributes:
        name: the model's.
        provider: who serves it at this price.
        input_per_million, output_per_million: for prompts and answers.
        cached_per_million: for tokens of a prompt that the provider still held; the input price where
            the provider has no other.
        dated: ISO date of the data.
        origin: `genai-prices` and its version, or the file.
    """

    name: str
    provider: str
    input_per_million: float
    output_per_million: float
    cached_per_million: float
    dated: str
    origin: str


def api_prices(names: Sequence[str], own: Path | None = None, per_usd: float = 1.0) -> list[ApiPrice]:
    """The prices of `names`, in order."""
    raise NotImplementedError
