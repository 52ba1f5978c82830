"""What a chat yields: pieces of text and reasoning, complete tool calls, then one `Stats`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from moebox.cost.usage import Joules, Traffic

if TYPE_CHECKING:
    from moebox.cost.economics import TokenCost

PieceKind = Literal["text", "reasoning", "tool_call", "stats"]
FinishReason = Literal["stop", "length", "context", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model asks for; `arguments` is its JSON text, exactly as generated."""

    id: str
    name: str
    arguments: str

    def to_message(self) -> dict[str, Any]:
        """The call as an entry of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Stats:
    """What one answer cost.

    `prompt_tokens` counts the whole prompt, `cached_tokens` the part of it that the key-value cache
    still held; `prefill_s` is the time for the others, `ttft_s` the time to the first generated token.
    `decoded_tokens` is what came after the first one, with the token that ended the answer, in `decode_s`.
    `computed_tokens` are those of the prompt that were computed, and the answer's.
    `queue_s` is what the caller says the request has waited. `energy` has one entry per source; `cost` is
    money per million computed tokens, in `currency`, of a box that does nothing else; None where no token
    was computed.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    decoded_tokens: int
    computed_tokens: int
    prefill_s: float
    decode_s: float
    ttft_s: float
    finish_reason: FinishReason
    seed: int
    context_used: int
    context: int
    queue_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    energy: tuple[Joules, ...] = ()
    cost: TokenCost | None = None
    currency: str = "USD"

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed (not reused) a second; 0 where nothing was timed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens decoded a second; 0 where the first one was the last."""
        return self.decoded_tokens / self.decode_s if self.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, the two rates included, for JSON."""
        rates = {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
        return asdict(self) | rates


@dataclass(frozen=True)
class Piece:
    """One step of a streamed answer.

    `text` is set for the kinds `text` and `reasoning`, `tool_call` and `stats` for theirs. `warning`
    says what was wrong where malformed output is handed on as text, or a call's arguments are no JSON.
    """

    kind: PieceKind
    text: str = ""
    tool_call: ToolCall | None = None
    stats: Stats | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` are the generated ids, without the one that ended it."""

    text: str
    tokens: list[int]
    stats: Stats
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
