"""An A/B trial while tokens are decoded: does a feature, such as prefetching, make tokens faster or slower?

Tokens with the feature are compared with tokens without it. A token's time depends mostly on how many of its
experts must be read, and is noisy besides, so its logarithm is fitted by least squares:

    log(seconds) = a * on + b + c * to_read + d * number + noise

where `on` is 1 for tokens with the feature and 0 for others, `to_read` is the number of experts that had to
be read, and `number` counts the tokens. The feature changes a token's time by the factor exp(a).

While it is not known to pay, tokens with the feature may cost no more than a budget, a share of the time that
has passed (`budget_s`). The feature is switched on by a trial that finds it clearly faster, and off by one
that does not; after that it is tried again from time to time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

SHARE = 0.01
"""Share of the time that trials may cost."""
FIRST_SHARE = 0.02
"""The same in the first minute. What this allows in total does not exceed `SHARE` of the first minute."""
FIRST_MINUTE_S = 60.0
WORST = 1.0
"""Relative change of a token's time that is assumed of the first token with the feature."""
LEAST_ON = 4
"""Tokens with the feature before a trial is decided."""
CLEAR_ERRORS = 2.5
"""A change is clear if it is at least so many standard errors from 0."""
FIT_TOKENS = 96
"""The fit uses so many tokens, the latest ones."""
LEAST_FIT = 12
"""The fit needs so many tokens."""
LAST_TOKENS = 192
"""A trial is decided after so many tokens, even if the change is not clear."""
REST_TOKENS = 256
"""Tokens without the feature after a trial that it lost. Each further loss in a row doubles them."""
LONGEST_REST = 8192
CONTROL_EVERY = 8
"""While the feature is on, at most one token in so many goes without it, as a control. There are fewer
controls where controls would cost more than `SHARE`."""
CHECK_EVERY = 8
"""Tokens between two fits. The first `LEAST_ON` tokens with the feature are followed by a fit each."""
OUTLIERS = 3.0
"""Standard deviations from the fit to which a token's residual is clipped."""
CLIPS = 4
"""Times that the fit is repeated with clipped residuals."""
DEVIATION = 1.4826
"""Standard deviation of a normal distribution, divided by its median absolute deviation."""
TINY = 1e-9
"""Added to the diagonal of a matrix that is singular where, say, all tokens read as many experts."""


class Trial:
    """Decides for each token whether it goes with the feature; `observe` each token's time.

    The first tokens go without it. During a trial, tokens with and without it alternate, as far as the budget
    allows. If the feature lost, tokens go without it for a rest, and then a new trial begins. If it won,
    tokens go with it, except for a few controls; when these show that it does not pay any more, a new trial
    begins.

    Attributes:
        on: whether the coming token goes with the feature.
        trying: whether a trial is going on.
        change: relative change of a token's time by the feature, as last measured; negative if it makes
            tokens faster. None: not measured yet.
        error: standard error of log(1 + change).
    """

    def __init__(self) -> None:
        self.on = False
        self.trying = True
        self.change: float | None = None
        self.error = math.inf
        self._tokens: deque[tuple[float, int, bool]] = deque(maxlen=FIT_TOKENS)
        self._time_s = 0.0
        self._cost_s = 0.0
        self._place = 0
        self._on_s: list[float] = []
        self._rest = 0
        self._next_rest = REST_TOKENS

    @property
    def cost_s(self) -> float:
        """Seconds that tokens with the feature have taken longer in all trials so far; gains count as 0."""
        change = self.change or 0.0
        return self._cost_s + sum(self._on_s) * max(0.0, change / (1 + change))

    @property
    def why_off(self) -> str:
        """Why the feature is off, for people."""
        return (
            f"no clear gain, tokens take {self.change or 0:+.1%} with it (standard error {self.error:.1%}); "
            "it is tried again from time to time"
        )

    def observe(self, seconds: float, to_read: int) -> bool:
        """Take in a token's time.

        Args:
            seconds: the token's time.
            to_read: how many of its experts had to be read.

        Returns:
            Whether this token decided a trial.
        """
        self._time_s += seconds
        self._place += 1
        self._tokens.append((math.log(seconds), to_read, self.on))
        if self._rest:
            self._rest -= 1
            if not self._rest:
                self._begin()
            return False
        if self.on and self.trying:
            self._on_s.append(seconds)
        decided = self._watch() if not self.trying else self._try()
        self.on = self._turn()
        return decided

    def _begin(self) -> None:
        self.trying, self._place = True, 0
        self._on_s.clear()

    def _end(self) -> None:
        self._cost_s = self.cost_s
        self.trying, self._place = False, 0
        self._on_s.clear()

    def _try(self) -> bool:
        """Decide the trial, if there are enough tokens; returns whether it is decided."""
        one_of_the_first = self.on and len(self._on_s) <= LEAST_ON
        if not (self._on_s and (one_of_the_first or self._place % CHECK_EVERY == 0) and self._fit()):
            return False
        change = math.log1p(self.change or 0.0)
        unclear = abs(change) < CLEAR_ERRORS * self.error
        if len(self._on_s) < LEAST_ON or (unclear and self._place < LAST_TOKENS):
            return False
        self._end()
        if change < -self.error:
            self._next_rest = REST_TOKENS
        else:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
        return True

    def _watch(self) -> bool:
        """The feature is on: begin a new trial when it does not seem to pay any more."""
        if self._place % CHECK_EVERY == 0 and self._fit() and (self.change or 0.0) >= 0:
            self._begin()
        return False

    def _turn(self) -> bool:
        """Whether the next token goes with the feature."""
        if self._rest:
            return False
        if not self.trying:
            gain = -(self.change or 0.0)
            return (self._place + 1) % max(CONTROL_EVERY, math.ceil(gain / SHARE)) != 0
        # On, off, off, on: a steady drift of the times affects both kinds of tokens equally.
        return not (self._place ^ self._place >> 1) & 1 and self._affordable()

    def _affordable(self) -> bool:
        """Whether one more token with the feature keeps the budget, if it is 2 standard errors slower than
        the fit says."""
        slower = WORST
        if self._on_s:
            slower = min(WORST, max(0.0, (self.change or 0.0) + 2 * self.error))
        token_s = math.exp(sum(log_s for log_s, _, _ in self._tokens) / len(self._tokens))
        return self.cost_s + slower * token_s <= budget_s(self._time_s)

    def _fit(self) -> bool:
        """Measure the change from the last tokens; returns False if there are too few of either kind."""
        n_on = sum(on for _, _, on in self._tokens)
        if len(self._tokens) < LEAST_FIT or n_on in (0, len(self._tokens)):
            return False
        change, self.error = fit_change(self._tokens)
        self.change = math.expm1(change)
        return True


def fit_change(tokens: Sequence[tuple[float, int, bool]]) -> tuple[float, float]:
    """The factor `a` of the module's formula, fitted, and its standard error.

    Args:
        tokens: (log of the seconds, experts to be read, whether the feature was on), in order; at least
            `LEAST_FIT` of them, and some of each kind.
    """
    log_s, to_read, on = np.array(tokens).T
    numbers = np.arange(len(on)) / len(on)
    terms = np.stack([on, np.ones_like(on), to_read - to_read.mean(), numbers - numbers.mean()], axis=1)
    inverse = np.linalg.inv(terms.T @ terms + np.diag([0.0, *[TINY] * 3]))
    solve = inverse @ terms.T
    factors, clipped_s = solve @ log_s, log_s
    # Few tokens have the feature, and one that was slow for another reason moves their mean too far: begin
    # with their median.
    residuals = np.sort((log_s - terms @ factors)[on > 0])
    factors[0] += residuals[len(residuals) // 2]
    for _ in range(CLIPS):
        fitted = terms @ factors
        residuals = log_s - fitted
        limit = OUTLIERS * DEVIATION * float(np.sort(np.abs(residuals))[len(on) // 2])
        clipped_s = fitted + np.clip(residuals, -limit, limit)
        factors = solve @ clipped_s
    residuals = clipped_s - terms @ factors
    variance = float(residuals @ residuals) / (len(on) - terms.shape[1])
    return float(factors[0]), math.sqrt(variance * inverse[0, 0])


def budget_s(time_s: float) -> float:
    """Seconds that trials may have cost when tokens have taken `time_s` in all."""
    return max(SHARE * time_s, min(FIRST_SHARE * time_s, SHARE * FIRST_MINUTE_S))
