"""A server of one's own, as a child process for as long as it is needed."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_S = 30  # for the child to leave when told to


@contextmanager
def own_server(
    script: Path, flags: Sequence[str], report: Callable[[str], None]
) -> Iterator[tuple[str, int]]:
    """Yields address and process id of `script` (serve.py), run with `flags` on a free port.

    `report` gets the lines it prints until it is ready. Ctrl-C does not reach it.

    Raises:
        ValueError: it did not start; the message is its own.
    """
    command = [sys.executable, str(script), "--port", "0", *flags]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            url, last = _address(child, report)
            if url is None:
                raise ValueError(f"the server did not start: {last}")
            threading.Thread(target=_drain, args=(child,), daemon=True).start()
            yield url, child.pid
        finally:
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _address(child: subprocess.Popen[str], report: Callable[[str], None]) -> tuple[str | None, str]:
    assert child.stdout is not None
    line = ""
    for line in child.stdout:
        if found := re.match(r"API +(\S+)/v1\s", line):
            return found[1], line
        if line.strip():
            report(line.rstrip())
    return None, line.strip()


def _drain(child: subprocess.Popen[str]) -> None:
    """Reads on: a full pipe would stop the server."""
    assert child.stdout is not None
    for _ in child.stdout:
        pass
