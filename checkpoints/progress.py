"""Progress of long work: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts finished bytes of named parts. Thread-safe; also a context manager.

    Standard error takes the bar and warnings, standard output takes nothing.
    """

    def __init__(self, what: str, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.what = what
        self.quiet = quiet
        self.stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()
        self._bar: tqdm | None = None
        self._total = self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def start(self, total: int, done: int = 0, what: str | None = None) -> None:
        """Begins a phase of `total` bytes, `done` of which were there before."""
        self.finish()
        self.what = what or self.what
        self._total, self._done = total, done
        if not self.quiet and self.stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=self.what, unit="B", unit_scale=True,
                file=self.stream,
            )  # fmt: skip

    def advance(self, part: str, count: int) -> None:
        """Records that `part`, `count` bytes, is finished."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.set_postfix_str(part, refresh=False)
                self._bar.update(count)
            else:
                share = 100 * self._done // max(self._total, 1)
                self._print(f"{self.what}: {part} done, {share} % of {self._total / 1e9:.3f} GB")

    def note(self, text: str) -> None:
        """Prints one line beside the bar."""
        with self._lock:
            self._print(text)

    def finish(self) -> None:
        """Closes the bar, if any."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
