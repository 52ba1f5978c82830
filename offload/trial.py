"""Whether something pays, found out live: tokens with and without it take turns until time tells.

A token's time depends mostly on how many of its experts must be read, and is noisy besides. So the logarithm
of the time is fitted, by least squares, as a constant, a part that grows with the number of experts to be
read, and the change that is asked for, which is then a share of the time.
"""

from __future__ import annotations

import math

import numpy as np

FIRST_TOKENS = 24
"""Tokens before the first decision."""
CHECK_TOKENS = 8
"""Tokens from one decision to the next."""
LAST_TOKENS = 160
"""Tokens after which the fit decides, however unclear it is."""
SETTLED_TOKENS = 1024
"""Tokens that go the way decided on, until the next trial: contexts grow, and drives get busy."""
CLEAR_ERRORS = 2.0
"""A change is clear from so many standard errors on."""
OUTLIERS = 10.0
"""Percentile of the times, from both ends, beyond which they count as no longer or shorter."""


class Trial:
    """Decides token by token; `observe` what came of it.

    Attributes:
        on: whether the coming token goes with the thing that is tried.
        change: relative change of a token's time, as the last trial measured it; below 0: it pays. None: no
            trial has ended.
        error: standard error of `change`.
    """

    def __init__(self) -> None:
        self.on = True
        self.change: float | None = None
        self.error = math.inf
        self._tokens: list[tuple[float, int, bool]] = []
        self._settled = 0

    @property
    def trying(self) -> bool:
        """Whether tokens take turns now."""
        return not self._settled

    def observe(self, seconds: float, to_read: int) -> bool:
        """A token took so long, `to_read` of its experts not being in RAM.

        Returns:
            Whether a trial has ended with it.
        """
        if self._settled:
            self._settled -= 1
            self.on = self._turn() if not self._settled else self.on
            return False
        self._tokens.append((math.log(seconds), to_read, self.on))
        count = len(self._tokens)
        if count >= FIRST_TOKENS and count % CHECK_TOKENS == 0 and self._decides():
            self._tokens.clear()
            self._settled = SETTLED_TOKENS
            return True
        self.on = self._turn()
        return False

    def _turn(self) -> bool:
        """On, off, off, on: whatever changes steadily falls on both sides alike."""
        place = len(self._tokens)
        return not (place ^ place >> 1) & 1

    def _decides(self) -> bool:
        change, error = self._fit()
        if abs(change) < CLEAR_ERRORS * error and len(self._tokens) < LAST_TOKENS:
            return False
        self.change, self.error = math.expm1(change), error
        self.on = change < 0
        return True

    def _fit(self) -> tuple[float, float]:
        """Change of the logarithm of the time, and its standard error."""
        log_seconds, to_read, on = np.array(self._tokens).T
        log_seconds = np.clip(log_seconds, *np.percentile(log_seconds, [OUTLIERS, 100 - OUTLIERS]))
        terms = np.stack([np.ones_like(on), to_read, on], axis=1)
        inverse = np.linalg.pinv(terms.T @ terms)
        factors = inverse @ terms.T @ log_seconds
        rest = log_seconds - terms @ factors
        variance = float(rest @ rest) / (len(rest) - terms.shape[1])
        return float(factors[2]), math.sqrt(variance * inverse[2, 2])
