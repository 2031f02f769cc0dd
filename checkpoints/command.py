"""What the conversion commands share: progress, one-line errors, exit status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from checkpoints.progress import Progress


def run(script: str, verb: str, work: Callable[[Progress], str]) -> int:
    """Calls `work` and prints its result; an expected failure is one message and status 1."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; errors are ours
    original = sys.unraisablehook
    sys.unraisablehook = _without_closed_loops(original)
    try:
        with Progress(verb) as progress:
            result = work(progress)
    except (ValueError, OSError) as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{script}: interrupted; run the same command to continue", file=sys.stderr)
        return 1
    print(result)
    return 0


def _without_closed_loops(hook: Callable) -> Callable:
    """After a failed write, TensorStore reports its other writes to an event loop that is gone."""

    def filtered(event: sys.UnraisableHookArgs) -> None:
        if not (event.exc_type is RuntimeError and "loop is closed" in str(event.exc_value)):
            hook(event)

    return filtered
