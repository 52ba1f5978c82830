"""`moebox.load` and the `Model` it returns: logits, completions and chats in Python."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.config import load_config
from moebox.cost.accounts import Accounts, Request, login_name
from moebox.cost.prices.box_prices import load_prices
from moebox.cost.usage import Traffic
from moebox.errors import RequestError
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.generate.answer import AnswerPieces, Parser, PlainParser, ReceivedAnswer
from moebox.runtime.generate.generated_texts import GeneratedTexts
from moebox.runtime.generate.kept_session import KeptSession
from moebox.runtime.generate.loop import ContextError, Generation, OnPrefill, TokenSession
from moebox.runtime.generate.sampling import Sampler, SamplingOptions, generation_defaults
from moebox.runtime.text.messages import Message, Tool, next_tool_call_index, normalise_messages
from moebox.runtime.text.output_parser import THINK_BEGIN, THINK_END, OutputParser
from moebox.runtime.text.pieces import Completion, Piece, Stats, ToolCall
from moebox.runtime.text.template import Template
from moebox.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from moebox.runtime.engine.engine import Engine

__all__ = ["Completion", "Model", "Piece", "SamplingOptions", "Stats", "ToolCall", "load"]

STOP_NAMES = ("[EOS]", "<|im_end|>", "[EOT]")
"""Control tokens that end every answer, since the eos ids of the configs contradict the templates."""


def load(
    path: str | Path,
    device: str | None = None,
    vram: int | None = None,
    ram: int | None = None,
    *,
    options: LoadOptions | None = None,
    **fields: Any,
) -> Model:
    """Load a quantized checkpoint with its tokenizer and chat template.

    Args:
        path: a folder that `moebox quantize` wrote, or a native INT4 checkpoint of the family.
        device: "cpu", "cuda" or "cuda:N"; None for the GPU if there is one.
        vram: GPU memory to use, bytes; None for what is free.
        ram: memory to use, bytes; experts beyond it are read from disk. None for what is free.
        options: how to load, as one object.
        fields: fields of `LoadOptions` by name, such as `context`, `backbone` or `stores`; they replace those
            of `options`, as do `device`, `vram` and `ram` where they are not None.

    Raises:
        TypeError: names a field that `LoadOptions` does not have.
        ConfigError, CheckpointError, TokenizerError, PlanError, PricesError: names file, value and fix.
    """
    given = {"device": device, "vram": vram, "ram": ram}
    fields |= {name: value for name, value in given.items() if value is not None}
    options = replace(options or LoadOptions(), **fields)
    folder = Path(path)
    # Small files come first: a missing tokenizer is reported before minutes of loading.
    prices = load_prices()
    tokenizer = Tokenizer.load(folder, load_config(folder).vocab_size)
    template = Template.load(folder, tokenizer)
    from moebox.runtime.engine.engine import Engine

    engine = Engine.load(folder, options)
    accounts = Accounts.open(engine.device, prices, ledger=options.ledger)
    return Model(engine, tokenizer, template, accounts, options.user)


@dataclass(frozen=True)
class _CallOptions:
    """What a caller of `chat` or `generate` gave besides the prompt.

    `afresh`: compute the whole prompt, even where the kept session holds a part of it.
    """

    sampling: dict[str, Any]
    cancel: threading.Event | None
    user: str | None
    queue_s: float
    on_prefill: OnPrefill | None = None
    afresh: bool = False


class Model:
    """A loaded model. One answer at a time; the cache of the last conversation is kept.

    A context manager: leaving it is `close`.

    Attributes:
        engine: weights and arithmetic.
        tokenizer: text <-> token ids.
        template: messages -> token ids.
        defaults: sampling options where a call gives none (the checkpoint's own, where it has any).
        stop_ids: tokens that end an answer.
        accounts: measures what answers use, and knows the prices.
        user: the user's name in the ledger where a call gives none.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        accounts: Accounts,
        user: str | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.accounts = accounts
        self.user = user or login_name()
        self.defaults, eos_ids = generation_defaults(Path(engine.folder))
        named = {tokenizer.specials[name] for name in STOP_NAMES if name in tokenizer.specials}
        self.stop_ids = frozenset({*engine.config.eos_token_ids, *eos_ids, *named})
        self._kept = KeptSession(engine)
        self._generated = GeneratedTexts(tokenizer)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End reads, and save the statistics of routing and the ledger's last rows.

        The model answers nothing afterwards. The end of the program closes it, too.
        """
        try:
            self.engine.close()
        finally:
            self.accounts.close()

    @property
    def name(self) -> str:
        """The checkpoint folder's name."""
        return Path(self.engine.folder).resolve().name

    @property
    def session(self) -> TokenSession:
        """The session whose cache is kept from answer to answer; opened on first use."""
        return self._kept.get()

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits of one forward pass that keeps no cache: fp32 [T, vocab_size]."""
        return self.engine.logits(token_ids)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        cancel: threading.Event | None = None,
        user: str | None = None,
        queue_s: float = 0.0,
        **sampling: Any,
    ) -> Completion:
        """A whole answer: the continuation of a text (no template), or the reply to messages.

        The same seed gives the same text: with `seed` the prompt is computed afresh, since tokens that the
        cache holds were rounded in other batches.

        Args:
            prompt: a text, or chat messages.
            tools, thinking: as for `chat`; for messages only.
            cancel: set from another thread to end the answer early.
            user, queue_s: as for `chat`.
            sampling: fields of `SamplingOptions`.

        Raises:
            RequestError: an option, a message, or a prompt that does not fit the context.
        """
        call = _CallOptions(sampling, cancel, user, queue_s, afresh=sampling.get("seed") is not None)
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
            if not tokens:
                raise RequestError("the prompt is empty", "Give at least one character.")
            answer = self._answer(tokens, PlainParser(self.tokenizer), call)
        else:
            answer = self._chat(prompt, tools, thinking, call)
        return answer.completion()

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        *,
        cancel: threading.Event | None = None,
        on_prefill: OnPrefill | None = None,
        user: str | None = None,
        queue_s: float = 0.0,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """The reply to a conversation, streamed: text, reasoning and tool calls, then one stats piece.

        Only tokens after the longest common prefix with the last call are computed. Text never ends
        inside a character. The same seed gives the same text for the same calls since loading.

        Args:
            messages: the whole conversation, as in the OpenAI chat format.
            tools: OpenAI function declarations.
            thinking: let the model reason first, where its template has that switch.
            cancel: set from another thread or a signal handler to end the answer early.
            on_prefill: called with (tokens computed, tokens to compute) while the prompt is read.
            user: the user's name in the ledger; None: the model's `user`.
            queue_s: seconds that the request has waited before this call, for the ledger.
            sampling: fields of `SamplingOptions`.

        Raises:
            RequestError: an option, a message, or a conversation that does not fit the context; while the
                pieces are read: there is no memory for the cache.
            BusyError: another answer of this model is still running; raised when the first piece is read.
        """
        call = _CallOptions(sampling, cancel, user, queue_s, on_prefill)
        return iter(self._chat(messages, tools, thinking, call))

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, thinking: bool = True
    ) -> int:
        """Tokens of the prompt that `chat` would make of a conversation."""
        return len(self.template.render(messages, tools, thinking, generated=self._generated.ids))

    def _chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        thinking: bool,
        call: _CallOptions,
    ) -> _Answer:
        prompt = self.template.render(messages, tools, thinking, generated=self._generated.ids)
        next_index = next_tool_call_index(normalise_messages(messages))
        think_as_text = THINK_BEGIN not in self.tokenizer.specials and THINK_BEGIN in self.template.source
        parser = OutputParser(self.tokenizer, self._thinking_open(prompt), think_as_text, next_index)
        return self._answer(prompt, parser, call)

    def _thinking_open(self, prompt: list[int]) -> bool:
        """Whether the prompt ends inside a think block that the template opened."""
        begin, end = self.tokenizer.special(THINK_BEGIN), self.tokenizer.special(THINK_END)
        if begin is None:
            return self.tokenizer.decode(prompt[-16:]).rstrip().endswith(THINK_BEGIN)
        last = next((token for token in reversed(prompt) if token in self.tokenizer.special_names), end)
        return last == begin

    def _answer(self, prompt: list[int], parser: Parser, call: _CallOptions) -> _Answer:
        options, context = self.defaults.with_(**call.sampling), self.engine.context
        if len(prompt) > context:
            raise ContextError(
                f"the prompt has {len(prompt):,} tokens, but the context holds {context:,}",
                "Shorten the conversation, or load the model with a larger context.",
            )
        return _Answer(self, prompt, options, parser, call)


class _Answer:
    """One answer of a model: checked when it is made, computed while it is iterated, once.

    Nothing of the model changes before the iteration has the kept session for itself.
    """

    _generation: Generation
    _stats: Stats

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        options: SamplingOptions,
        parser: Parser,
        call: _CallOptions,
    ) -> None:
        self._model = model
        self._prompt = prompt
        self._options = options
        self._parser = parser
        self._call = call

    def __iter__(self) -> Iterator[Piece]:
        model = self._model
        with model._kept.use(afresh=self._call.afresh) as session:
            self._generation = self._generate(session)
            try:
                yield from self._accounted()
            finally:
                model._generated.add(self._generation.tokens)
        yield Piece("stats", stats=self._stats)

    def _generate(self, session: TokenSession) -> Generation:
        return Generation(
            session,
            self._prompt,
            Sampler(self._options, self._prompt),
            self._model.stop_ids,
            cancel=self._call.cancel,
            on_prefill=self._call.on_prefill,
        )

    def _accounted(self) -> Iterator[Piece]:
        """The answer's pieces; its account is closed however the answer ends."""
        model = self._model
        before, failed = model.engine.traffic(), False
        request = model.accounts.begin(model.name, self._call.user or model.user)
        self._generation.on_tokens = request.tokens
        try:
            yield from AnswerPieces(self._generation, self._parser, self._options.stop)
        except Exception:
            failed = True
            raise
        finally:
            self._close(request, model.engine.traffic() - before, failed)

    def _close(self, request: Request, traffic: Traffic, failed: bool) -> None:
        stats, accounts = self._generation.stats, self._model.accounts
        usage = replace(stats.usage, queue_s=self._call.queue_s, traffic=traffic)
        usage = request.end(usage, "error" if failed else stats.finish_reason).usage
        self._stats = replace(
            stats, usage=usage, cost=accounts.cost(usage), currency=accounts.prices.currency
        )

    def completion(self) -> Completion:
        """The whole answer."""
        received = ReceivedAnswer()
        for piece in self:
            received.add(piece)
        return Completion(
            text=received.text,
            tokens=self._generation.tokens,
            stats=received.stats,
            reasoning=received.reasoning,
            tool_calls=tuple(received.tool_calls),
        )
