"""The exceptions moebox raises for a user's mistake or a broken file.

Each message says what failed, names the file, the tensor and the value, and puts the fix on its
next line. `cli.py` prints the message without a traceback and exits with 1.
"""

from __future__ import annotations


class MoeboxError(Exception):
    """Base of every error that moebox raises on purpose."""

    def __init__(self, what: str, fix: str | None = None) -> None:
        super().__init__(what if fix is None else f"{what}\n{fix}")
        self.what = what
        self.fix = fix


class ConfigError(MoeboxError):
    """A `config.json` is missing, unreadable, of another model family, or contradicts itself."""


class CheckpointError(MoeboxError):
    """A checkpoint's file or tensor is missing, truncated, of a wrong shape or holds NaN or Inf."""


class TokenizerError(MoeboxError):
    """A tokenizer or chat template file is missing or cannot be used."""


class PlanError(MoeboxError):
    """The model, the context or the output does not fit the machine or the budget."""


class DeviceError(MoeboxError):
    """A GPU, its driver or its copies failed, or stopped answering."""


class PricesError(MoeboxError):
    """A price, a file of prices or the name of a hosted model cannot be used."""


class BusyError(MoeboxError):
    """Another process writes the same destination, or the model is computing another answer."""


class RequestError(MoeboxError):
    """A prompt, message list or sampling option that cannot be served, e.g. context overflow."""


class LedgerError(MoeboxError):
    """The ledger of requests is missing, damaged, of a newer moebox, not a ledger, or cannot be written."""
