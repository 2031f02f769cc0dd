"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until one of `stops` appears; with `keep` the stop string is its last part.

    Text that may be the beginning of a stop string is held back until that is decided. `hit` is
    the stop string that appeared.
    """

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self.hit: str | None = None
        self._stops = stops
        self._keep = keep
        self._held = ""

    def push(self, text: str) -> str:
        """Takes more text; returns what can be passed on."""
        text = self._held + text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            place, self.hit = min(places)
            self._held = ""
            return text[: place + (len(self.hit) if self._keep else 0)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    @property
    def is_hit(self) -> bool:
        return self.hit is not None

    def flush(self) -> str:
        """Returns what is held back: no stop string can begin in it any more."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
