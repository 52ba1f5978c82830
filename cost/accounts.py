"""The account of each request: what it used, what that cost, and its row in the ledger."""

from __future__ import annotations

import atexit
import getpass
import os
import time
import uuid
from typing import TYPE_CHECKING

from moebox.cost.economics import TokenCost, cost_of, work_of
from moebox.cost.energy.meter import EnergyMeter, Span
from moebox.cost.energy.power_model import PowerModel
from moebox.cost.ledger.writer import LedgerWriter
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Traffic, Usage

if TYPE_CHECKING:
    import torch


class Request:
    """One request on its way; made by `Accounts.begin`, and to be ended whatever becomes of it.

    Attributes:
        tokens: to be called with a number of tokens, of prompt or answer, when they are computed.
    """

    def __init__(self, accounts: Accounts, span: Span, model: str, user: str) -> None:
        self.tokens = span.tokens
        self._accounts, self._span, self._model, self._user = accounts, span, model, user
        self._started_s = time.time()

    def end(
        self,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        prefill_s: float,
        decode_s: float,
        finish_reason: str,
        traffic: Traffic,
        queue_s: float = 0.0,
    ) -> Usage:
        """Close the account, and hand it to the ledger. The figures are those of `Usage`."""
        usage = Usage(
            id=uuid.uuid4().hex,
            begun_s=self._started_s - queue_s,
            model=self._model,
            user=self._user,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            queue_s=queue_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            finish_reason=finish_reason,
            energy=self._span.end(),
            traffic=traffic,
        )
        if self._accounts.writer is not None:
            self._accounts.writer.put(usage)
        return usage


class Accounts:
    """Accounts of one box and the model on it: a meter, prices, and a ledger. Safe for several threads.

    `close` writes what is left, and so does the end of the program; a garbage collection does not.

    Attributes:
        meter: shares out the box's joules.
        prices: what a kilowatt-hour and the box cost.
        writer: takes rows; None: no ledger is kept.
    """

    def __init__(self, meter: EnergyMeter, prices: Prices, writer: LedgerWriter | None = None) -> None:
        self.meter, self.prices, self.writer = meter, prices, writer
        atexit.register(self.close)  # behind the writer's own, and so before it

    @classmethod
    def open(cls, device: torch.device | None, prices: Prices, *, ledger: bool = True) -> Accounts:
        """Open the box's counters and, if wanted, the user's ledger.

        Args:
            device: the GPU that computes, if one does.
            prices: of `load_prices`.
            ledger: keep a row of each request.
        """
        return cls(open_meter(device, prices), prices, LedgerWriter() if ledger else None)

    def begin(self, model: str, user: str) -> Request:
        """A request starts to use the box; what was idle until now goes to the ledger."""
        request = Request(self, self.meter.begin(), model, user)
        self._write_idle()
        return request

    def dollars(self, usage: Usage) -> TokenCost | None:
        """What a million tokens like those of `usage` cost, in the currency of `prices`.

        None where no token was computed. Without `prices.utilisation` only the time counts in which the box
        worked; `moebox cost` knows how long it waited.
        """
        return cost_of(work_of(usage), self.prices)

    def close(self) -> None:
        """Write what is left, and end the counters. Nothing is begun afterwards."""
        atexit.unregister(self.close)
        self._write_idle()
        self.meter.close()
        if self.writer is not None:
            self.writer.close()

    def _write_idle(self) -> None:
        for spell in self.meter.idle():
            if self.writer is not None:
                self.writer.put(spell)


def open_meter(device: torch.device | None, prices: Prices) -> EnergyMeter:
    """A meter of this box, with the watts that `prices` has where no counter can be read."""
    model = PowerModel(prices.idle_watts, prices.watts_per_core, prices.dram_watts)
    return EnergyMeter.open(device, model)


def login_name() -> str:
    """Who runs this process; their number where the system has no name for them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # until Python 3.12, and since
        return str(os.getuid())
