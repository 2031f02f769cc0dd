"""Several answers to one prompt: the first computes it, the others wait for its cache."""

import threading
from collections.abc import Callable

from dsv4_jax.serving.model import TokenStream

PATIENCE_S = 0.1  # between looks at whether to go on waiting


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Leader:
    """Where the first answer leaves its stream for the others."""

    def __init__(self) -> None:
        self._stream: TokenStream | None = None
        self._has_begun = threading.Event()

    def begin(self, stream: TokenStream | None) -> None:
        """Lets the others go on; None if there will be no stream. Later calls do nothing."""
        if not self._has_begun.is_set():
            self._stream = stream
            self._has_begun.set()

    def wait(self, is_cancelled: Callable[[], bool]) -> TokenStream | None:
        """Returns the stream once it is there.

        Raises:
            Cancelled: nobody waits any more.
        """
        while not self._has_begun.wait(PATIENCE_S):
            if is_cancelled():
                raise Cancelled
        return self._stream


def started(leader: Leader | None, start: Callable[[], TokenStream]) -> TokenStream:
    """Returns what `start` returns, having told those who follow `leader`."""
    stream = None
    try:
        stream = start()
        return stream
    finally:
        if leader is not None:
            leader.begin(stream)
