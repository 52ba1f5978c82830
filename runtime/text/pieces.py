"""What a chat yields: pieces of text and reasoning, complete tool calls, and at the end one `Stats`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from moebox.cost.usage import Usage

if TYPE_CHECKING:
    from moebox.cost.economics import TokenCost

PieceKind = Literal["text", "reasoning", "tool_call", "stats"]
FinishReason = Literal["stop", "length", "context", "tool_calls", "cancelled"]


@dataclass(frozen=True)
class ToolCall:
    """A function call that the model asks for; `arguments` is JSON text, exactly as generated."""

    id: str
    name: str
    arguments: str

    def to_message(self) -> dict[str, Any]:
        """The call as an entry of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Stats:
    """The figures of one answer.

    Attributes:
        usage: what the answer used; `usage.prompt_tokens` counts the tokens of the prompt that were read.
        prompt_tokens: tokens of the whole prompt, also where the answer ended before all were read.
        decoded_tokens: tokens after the first one, with the one that ended the answer; they took
            `usage.decode_s`.
        ttft_s: seconds to the first token of the answer.
        finish_reason: why the answer ended.
        seed: of the sampler.
        context_used, context: tokens that the context holds after the answer, and can hold.
        cost: money per million computed tokens, in `currency`, on a box that never waits unless the prices
            name another utilisation; None where no token was computed.
        currency: a code of three letters.
    """

    usage: Usage
    prompt_tokens: int
    decoded_tokens: int
    ttft_s: float
    finish_reason: FinishReason
    seed: int
    context_used: int
    context: int
    cost: TokenCost | None = None
    currency: str = "USD"

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed (not reused) a second; 0 where nothing was timed."""
        usage = self.usage
        return (self.prompt_tokens - usage.cached_tokens) / usage.prefill_s if usage.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens decoded a second; 0 where the first one was the last."""
        return self.decoded_tokens / self.usage.decode_s if self.usage.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures, those of `usage` and the two rates included, for JSON."""
        own = asdict(self)
        return {
            **own.pop("usage"),
            **own,
            "computed_tokens": self.usage.computed_tokens,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


@dataclass(frozen=True)
class Piece:
    """One step of a streamed answer.

    Attributes:
        kind: which of the next three fields is set.
        text: of the kinds `text` and `reasoning`.
        tool_call: of the kind `tool_call`.
        stats: of the kind `stats`.
        warning: the fault of malformed output that is passed on as text, or of a call whose arguments are no
            JSON object.
    """

    kind: PieceKind
    text: str = ""
    tool_call: ToolCall | None = None
    stats: Stats | None = None
    warning: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` are the generated ids, without the token that ended the answer."""

    text: str
    tokens: list[int]
    stats: Stats
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
