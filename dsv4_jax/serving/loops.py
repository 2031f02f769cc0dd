"""Noticing that a model goes in circles."""

from collections import Counter, deque

WINDOW = 64  # tokens that are compared
MOST = 8  # times the same window may come


class LoopGuard:
    """Counts windows of tokens; memory grows with the text, by one number per token."""

    def __init__(self, window: int = WINDOW, most: int = MOST) -> None:
        self._recent: deque[int] = deque(maxlen=window)
        self._seen: Counter[int] = Counter()
        self._most = most

    def push(self, token: int) -> bool:
        """Takes the next token; True if its window has come too often."""
        self._recent.append(token)
        if len(self._recent) < (self._recent.maxlen or 0):
            return False
        window = hash(tuple(self._recent))
        self._seen[window] += 1
        return self._seen[window] > self._most
