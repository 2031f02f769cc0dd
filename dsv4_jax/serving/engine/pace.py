"""Whether guessing ahead pays: what it brings against what it costs, both as measured."""

from __future__ import annotations

PROBE_EVERY, PROBE_STEPS = 256, 8  # steps between two looks at the other width, and of a look
MARGIN = 1.05  # a change must promise this much
MEMORY = 0.05  # weight of a new measurement


class Pace:
    """Chooses how many tokens a step computes of each row: 1, or 1 + `guesses`.

    Cost depends on how many rows decode, so each doubling of rows is decided for itself; the share
    of guesses that stand is one number for all. Without `adapts` guessing is never turned off.
    No clock: `took` is told.
    """

    def __init__(self, guesses: int, adapts: bool = True) -> None:
        self.guesses, self._adapts = guesses, adapts
        self._gain = float(guesses)  # tokens a row gets beside the first; hopes for the best
        self._is_off: dict[int, bool] = {}
        self._cost_s: dict[tuple[int, int], float] = {}
        self._steps: dict[int, int] = {}

    def width(self, rows: int) -> int:
        """Tokens to compute of each of so many rows in the next step."""
        if not self.guesses or not self._adapts:
            return 1 + self.guesses
        group = rows.bit_length()
        step = self._steps[group] = self._steps.get(group, -1) + 1
        is_probe = PROBE_STEPS <= step % PROBE_EVERY < 2 * PROBE_STEPS
        return 1 if self._is_off.get(group, False) != is_probe else 1 + self.guesses

    def saw(self, guesses: int, taken: int) -> None:
        """So many guesses of a row were verified, so many stood."""
        if guesses == self.guesses:
            self._gain += MEMORY * (taken - self._gain)

    def took(self, rows: int, width: int, seconds: float) -> None:
        """A step that did nothing but decode took so long."""
        key = rows.bit_length(), width
        old = self._cost_s.get(key, seconds)
        # a single pause, of whatever cause, must not turn anything off
        self._cost_s[key] = old + MEMORY * (min(seconds, 4 * old) - old)
        self._decide(key[0])

    def _decide(self, group: int) -> None:
        plain = self._cost_s.get((group, 1))
        wide = self._cost_s.get((group, 1 + self.guesses))
        if plain is None or wide is None or not self.guesses:
            return
        worth = (1 + self._gain) * plain / wide
        if self._is_off.get(group, False):
            self._is_off[group] = worth < MARGIN
        else:
            self._is_off[group] = worth < 1 / MARGIN
