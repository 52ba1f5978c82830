"""`moebox chat`: a conversation in the terminal, or line by line through a pipe.

Ctrl-C stops the answer and keeps the session; at the prompt it clears the line. Ctrl-D leaves. What the
model wrote before an interrupt stays in the conversation, marked; a message that does not fit the
context stays at the prompt, unsent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from moebox.cost.economics import TokenCost, cost_of, work_of
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Usage
from moebox.errors import MoeboxError, RequestError
from moebox.runtime.generate.answer import ReceivedAnswer
from moebox.runtime.generate.loop import ContextError
from moebox.runtime.generate.sampling import SamplingOptions
from moebox.runtime.terminal.cancel import cancel_on_interrupt
from moebox.runtime.terminal.commands import COMMANDS, Leave, find_command
from moebox.runtime.terminal.conversation import Conversation, read_text, read_tools
from moebox.runtime.terminal.input import Reader, open_reader
from moebox.runtime.terminal.screen import Screen
from moebox.runtime.text.pieces import Stats, ToolCall

if TYPE_CHECKING:
    from moebox.runtime.api import Model

PROMPT = ">>> "
CONTEXT_FIX = "/clear starts a new conversation; your message is kept at the prompt."


@dataclass(frozen=True)
class ChatOptions:
    """What `moebox chat` starts with.

    `tools` is a JSON file of function declarations, `load` a chat that `/save` wrote, `history` the file
    of past input (None: in the user's state folder); `sampling` holds fields of `SamplingOptions`.
    """

    system: str | None = None
    tools: Path | None = None
    thinking: bool = True
    load: Path | None = None
    history: Path | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def main(model: Model, options: ChatOptions | None = None) -> int:
    """Chat until Ctrl-D or `/exit`; the exit code, 0.

    Raises:
        MoeboxError: the options are wrong. Errors of a turn are shown, and the chat goes on.
    """
    options = options or ChatOptions()
    screen = Screen()
    reader = open_reader([f"/{command.name}" for command in COMMANDS], options.history)
    return Chat(model, options, screen, reader).run()


@dataclass
class Totals:
    """The figures of all answers of the session so far."""

    answers: int = 0
    decoded_tokens: int = 0
    usage: Usage = field(default_factory=Usage)

    def add(self, stats: Stats) -> None:
        """Count one more answer."""
        self.answers += 1
        self.decoded_tokens += stats.decoded_tokens
        self.usage += stats.usage

    def cost(self, prices: Prices) -> TokenCost | None:
        """Money per million tokens, as `Stats.cost`."""
        return cost_of(work_of(self.usage), prices)


class Chat:
    """A chat: its conversation, its settings, and the loop that asks and answers."""

    def __init__(self, model: Model, options: ChatOptions, screen: Screen, reader: Reader) -> None:
        self.model = model
        self.screen = screen
        self.conversation = Conversation.load(options.load) if options.load else Conversation()
        if options.system is not None:
            self.conversation.system = options.system
        if options.tools is not None:
            self.conversation.tools = read_tools(options.tools)
        self.thinking = options.thinking
        self.sampling: SamplingOptions = model.defaults.with_(**options.sampling)
        self.totals = Totals()
        self.last: Stats | None = None
        self.attached: list[str] = []
        """Texts of `/read`, sent with the next message."""
        self._reader = reader
        self._unsent = ""

    def run(self) -> int:
        """Ask, answer, repeat."""
        context = self.model.session.context
        self.screen.note(f"{self.model.name} · context {context:,} tokens · /help · Ctrl-D leaves")
        while True:
            try:
                line = self._reader.ask(PROMPT, self._unsent)
                self._unsent = ""
                self._handle(line)
            except (EOFError, Leave):
                return 0
            except KeyboardInterrupt:
                self.screen.note("Ctrl-D or /exit leaves")
            except MoeboxError as error:
                self.screen.error(error)

    def _handle(self, line: str) -> None:
        command = find_command(line)
        if command is not None:
            run, argument = command
            run(self, argument)
        elif line.strip():
            self.say(line.removeprefix("/") if line.startswith("//") else line)

    def say(self, text: str) -> None:
        """Send a message, with what `/read` attached, and answer it.

        A text that cannot be sent, or whose answer is stopped before it begins, stays at the prompt.
        """
        before = len(self.conversation.messages)
        self.conversation.add_user("\n\n".join([*self.attached, text]))
        answered = False
        try:
            answered = self.answer()
        finally:
            if answered:
                self.attached.clear()
            else:
                del self.conversation.messages[before:]
                self._unsent = text

    def answer(self) -> bool:
        """Let the model answer, asking the user for the results of the tools that it calls.

        Returns False where the user stopped the answer before it began.
        """
        calls = self._answer_once()
        answered = calls is not None
        while calls:
            for call in calls:
                result = self._ask_result(call)
                if result is None:
                    self.screen.note(f"{call.name} is left without a result")
                    return True
                self.conversation.add_result(call, result)
            calls = self._answer_once()
        return answered

    def _answer_once(self) -> list[ToolCall] | None:
        """The tool calls of one answer; None where the user stopped it before it began."""
        with cancel_on_interrupt() as cancel:
            answer = self._stream(cancel)
        self.screen.end_line()
        for warning in answer.warnings:
            self.screen.note(f"note: {warning}")
        stats = answer.stats
        interrupted = stats.finish_reason == "cancelled"
        if interrupted and not (answer.text or answer.reasoning or answer.tool_calls):
            self.screen.note("stopped before the answer began")
            return None
        self.last = stats
        self.totals.add(stats)
        self.conversation.add_answer(answer.text, answer.reasoning, answer.tool_calls, interrupted)
        self.screen.end(stats)
        if interrupted:
            self.screen.note("stopped; what was written so far is kept. /regen answers again")
        return [] if interrupted else answer.tool_calls

    def _stream(self, cancel: Event) -> ReceivedAnswer:
        conversation = self.conversation
        answer = ReceivedAnswer()
        try:
            pieces = self.model.chat(
                conversation.prompt(),
                conversation.tools,
                self.thinking,
                cancel=cancel,
                on_prefill=self.screen.prefill,
                **asdict(self.sampling),
            )
        except ContextError as error:
            raise ContextError(error.what, CONTEXT_FIX) from None
        for piece in pieces:
            answer.add(piece)
            self.screen.show(piece)
        return answer

    def _ask_result(self, call: ToolCall) -> str | None:
        """The tool's result, which the user types (JSON or text) or `/read`s; None: the user gave none."""
        self.screen.note(f"type what {call.name} returns, JSON or text, or /read FILE; Ctrl-C leaves it open")
        while True:
            try:
                text = self._reader.ask(f"{call.name}> ", remember=False)
                if text.startswith("/read "):
                    return read_text(Path(text.removeprefix("/read ").strip()).expanduser())
                if text.strip():
                    return text
            except (EOFError, KeyboardInterrupt):
                return None
            except RequestError as error:
                self.screen.error(error)

    def attach(self, name: str, text: str) -> None:
        """Keep a file's text for the next message."""
        self.attached.append(f"{name}:\n```\n{text}\n```")

    def set_sampling(self, **changes: Any) -> None:
        """Change sampling options; `RequestError` names a bad one."""
        self.sampling = self.sampling.with_(**changes)
