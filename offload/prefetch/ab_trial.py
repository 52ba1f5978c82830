"""Whether something pays, found out live and at a limited price: tokens go the way that is known to be good,
a few of them the other way, and these may cost no more than a share of the time that has passed.

A token's time depends mostly on how many of its experts must be read, and is noisy besides. So the logarithm
of the time is fitted, by least squares, as a constant, a part that grows with the number of experts to be
read, one that grows with time, and the change that is asked for, which is then a share of the time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

FIRST_SHARE = 0.02
"""Of the time, what trials may cost in the first minute; what they have cost by its end is `SHARE` of it."""
SHARE = 0.01
"""Of the time, what trials may cost."""
FIRST_MINUTE_S = 60.0
WORST = 1.0
"""Change that is feared of the first token with the thing."""
LEAST_ON = 4
"""Tokens with it before it is judged."""
CLEAR_ERRORS = 2.5
"""A change is clear from so many standard errors on."""
FIT_TOKENS = 96
"""Tokens that the fit knows, the last ones."""
LEAST_FIT = 12
"""Tokens that it needs."""
LAST_TOKENS = 192
"""Tokens of a trial after which the fit decides, however unclear it is."""
REST_TOKENS = 256
"""Tokens without it after the first trial that was lost; twice as many after each further one."""
LONGEST_REST = 8192
CONTROL_EVERY = 8
"""While it is on, one token in so many goes without it, or fewer: what they lose keeps `SHARE` too."""
CHECK_EVERY = 8
"""Tokens from one fit to the next, once the first few with it are judged one by one."""
OUTLIERS = 3.0
"""Standard deviations from the fit beyond which a time counts as no longer or shorter."""
CLIPS = 4
"""Times that outliers are looked for: the first guess lies between them and the others."""
DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute one."""
TINY = 1e-9
"""Added to what may be singular: all tokens may have read as many."""


class Trial:
    """Decides token by token; `observe` what came of it.

    Tokens begin without the thing. In a trial they take turns, as far as the budget allows; one that was lost
    is followed by a rest, one that was won by tokens with it, among which some without go on to watch.

    Attributes:
        on: whether the coming token goes with the thing that is tried.
        trying: whether nothing is decided now.
        change: relative change of a token's time by it, as last measured; below 0: it pays. None: not known.
        error: standard error of `change`.
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
        """Seconds that trials have cost so far, as far as is known: gains are not set against it."""
        change = self.change or 0.0
        return self._cost_s + sum(self._on_s) * max(0.0, change / (1 + change))

    @property
    def why_off(self) -> str:
        """What the trial that was lost has found."""
        return (
            f"no clear gain, tokens take {self.change or 0:+.1%} with it (standard error {self.error:.1%}); "
            "it is tried again from time to time"
        )

    def observe(self, seconds: float, to_read: int) -> bool:
        """A token took so long, `to_read` of its experts having to be read.

        Returns:
            Whether something was decided with it.
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
        """Decide if the trial is clear."""
        first_ones = self.on and len(self._on_s) <= LEAST_ON
        if not (self._on_s and (first_ones or self._place % CHECK_EVERY == 0) and self._fit()):
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
        """It is on: a new trial begins when it does not seem to pay any more."""
        if self._place % CHECK_EVERY == 0 and self._fit() and (self.change or 0.0) >= 0:
            self._begin()
        return False

    def _turn(self) -> bool:
        """Whether the next token goes with it."""
        if self._rest:
            return False
        if not self.trying:
            gain = -(self.change or 0.0)
            return (self._place + 1) % max(CONTROL_EVERY, math.ceil(gain / SHARE)) != 0
        # On, off, off, on: whatever changes steadily falls on both sides alike.
        return not (self._place ^ self._place >> 1) & 1 and self._affordable()

    def _affordable(self) -> bool:
        """Whether one more token with it keeps the budget, if it turns out as bad as is to be feared."""
        feared = WORST
        if self._on_s:
            feared = min(WORST, max(0.0, (self.change or 0.0) + 2 * self.error))
        token_s = math.exp(sum(log_s for log_s, _, _ in self._tokens) / len(self._tokens))
        return self.cost_s + feared * token_s <= budget_s(self._time_s)

    def _fit(self) -> bool:
        """Measure the change of the last tokens; returns whether there are enough of both kinds."""
        n_on = sum(on for _, _, on in self._tokens)
        if len(self._tokens) < LEAST_FIT or n_on in (0, len(self._tokens)):
            return False
        change, self.error = fit_change(self._tokens)
        self.change = math.expm1(change)
        return True


def fit_change(tokens: Sequence[tuple[float, int, bool]]) -> tuple[float, float]:
    """What a thing changes of the logarithm of a token's time, and the standard error of that.

    Args:
        tokens: logarithm of the time, experts to be read, and whether it was on; one after the other, at
            least `LEAST_FIT` of them, and some of each kind.
    """
    log_s, to_read, on = np.array(tokens).T
    numbers = np.arange(len(on)) / len(on)
    terms = np.stack([on, np.ones_like(on), to_read - to_read.mean(), numbers - numbers.mean()], axis=1)
    inverse = np.linalg.inv(terms.T @ terms + np.diag([0.0, *[TINY] * 3]))
    solve = inverse @ terms.T
    factors, kept_s = solve @ log_s, log_s
    # Few are with it, and one of them that was slow for another reason moves their mean too far.
    changes = np.sort((log_s - terms @ factors)[on > 0])
    factors[0] += changes[len(changes) // 2]
    for _ in range(CLIPS):
        usual = terms @ factors
        rest = log_s - usual
        limit = OUTLIERS * DEVIATION * float(np.sort(np.abs(rest))[len(on) // 2])
        kept_s = usual + np.clip(rest, -limit, limit)
        factors = solve @ kept_s
    rest = kept_s - terms @ factors
    variance = float(rest @ rest) / (len(on) - terms.shape[1])
    return float(factors[0]), math.sqrt(variance * inverse[0, 0])


def budget_s(time_s: float) -> float:
    """What trials may have cost after so long, in seconds."""
    return max(SHARE * time_s, min(FIRST_SHARE * time_s, SHARE * FIRST_MINUTE_S))
