"""The account of each request: its energy, its price, and its row in the ledger."""

from __future__ import annotations

import atexit
import getpass
import os
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from moebox.cost.economics import TokenCost, cost_of, work_of
from moebox.cost.energy.meter import EnergyMeter, Span
from moebox.cost.energy.power_model import PowerModel
from moebox.cost.ledger.writer import LedgerWriter
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import RequestRecord, Usage

if TYPE_CHECKING:
    import torch


class Request:
    """A running request. `Accounts.begin` makes it; `end` must be called, also after an error.

    Attributes:
        tokens: call it with a number of tokens, of prompt or answer, when they are computed.
    """

    def __init__(self, accounts: Accounts, span: Span, model: str, user: str) -> None:
        self.tokens = span.tokens
        self._accounts, self._span, self._model, self._user = accounts, span, model, user
        self._started_s = time.time()

    def end(self, usage: Usage, finish_reason: str) -> RequestRecord:
        """Stop the measurement and write the record to the ledger.

        Args:
            usage: all figures but the energy, which the record holds as measured.
            finish_reason: as in `RequestRecord`.
        """
        record = RequestRecord(
            id=uuid.uuid4().hex,
            begun_s=self._started_s - usage.queue_s,
            model=self._model,
            user=self._user,
            finish_reason=finish_reason,
            usage=replace(usage, energy=self._span.end()),
        )
        if self._accounts.writer is not None:
            self._accounts.writer.put(record)
        return record


class Accounts:
    """The accounts of one box and the model on it: a meter, prices, and a ledger. Safe for several threads.

    `close` and the end of the program write the rows that are left; garbage collection does not.

    Attributes:
        meter: shares the box's joules among requests.
        prices: the price of a kilowatt-hour and of the box.
        writer: writes the rows; None: no ledger is kept.
    """

    def __init__(self, meter: EnergyMeter, prices: Prices, writer: LedgerWriter | None = None) -> None:
        self.meter, self.prices, self.writer = meter, prices, writer
        # `atexit` calls the last function first, so this runs before the writer's own `close`.
        atexit.register(self.close)

    @classmethod
    def open(cls, device: torch.device | None, prices: Prices, *, ledger: bool = True) -> Accounts:
        """Open the box's energy counters and, with `ledger`, the user's ledger.

        Args:
            device: the GPU that computes; None or a CPU: no GPU is measured.
            prices: from `load_prices`.
            ledger: keep a row of each request.
        """
        return cls(open_meter(device, prices), prices, LedgerWriter() if ledger else None)

    def begin(self, model: str, user: str) -> Request:
        """Begin to measure a request; the idle time until now goes to the ledger."""
        request = Request(self, self.meter.begin(), model, user)
        self._write_idle()
        return request

    def cost(self, usage: Usage) -> TokenCost | None:
        """Price of a million tokens like those of `usage`, in the currency of `prices`.

        None where no token was computed. Without `prices.utilisation` only the seconds of work are paid;
        `moebox cost` also counts those in which the box waited.
        """
        return cost_of(work_of(usage), self.prices)

    def close(self) -> None:
        """Write the rows that are left and close the counters. No request may begin afterwards."""
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
    """A meter of this box, which estimates with the watts of `prices` where it can read no counter."""
    model = PowerModel(prices.idle_watts, prices.watts_per_core, prices.dram_watts)
    return EnergyMeter.open(device, model)


def login_name() -> str:
    """The login name of this process's user, or the user's number where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # KeyError until Python 3.12, OSError since
        return str(os.getuid())
