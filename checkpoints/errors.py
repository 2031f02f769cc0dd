"""The one error type of this package, and the translation of low-level failures into it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

MAX_LISTED = 50


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, incomplete or not what it says; or cannot be written."""


def listing(head: str, problems: list[str]) -> CheckpointError:
    """One error that names every problem; the print is cut after 50 with a count of the rest."""
    lines = problems[:MAX_LISTED]
    if len(problems) > MAX_LISTED:
        lines = [*lines, f"… and {len(problems) - MAX_LISTED} more"]
    return CheckpointError("\n  ".join([f"{head}:", *lines]))


def write_failure(what: str, error: Exception) -> CheckpointError | None:
    """The clear form of a failed write of `what`, or None when `error` is something else.

    TensorStore reports system errors as ValueError or RuntimeError with the errno in its text.
    """
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.ENOSPC or "No space left on device" in text:
        return CheckpointError(
            f"no space left on the device while writing {what}: free some space and run the same "
            "command again"
        )
    if code == errno.EDQUOT or "Disk quota exceeded" in text:
        return CheckpointError(f"disk quota exceeded while writing {what}")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text:
        return CheckpointError(f"cannot write {what}: permission denied or read-only file system")
    if isinstance(error, OSError):
        return CheckpointError(f"cannot write {what}: {error.strerror or error}")
    return None


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turns a full disk or a refused write inside the block into one clear error about `what`."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        clear = write_failure(what, error)
        if clear is None:
            raise
        raise clear from error
