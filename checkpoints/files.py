"""Durable file operations: a file or directory is there in full, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

# Files beside the weights that belong to a model and are carried along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
TOKENIZER_FOLDERS = ("encoding",)
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def fsync_path(path: Path) -> None:
    """Flushes one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # network file systems may have nothing to flush for a directory and say so
        if not path.is_dir() or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def fsync_tree(root: Path) -> None:
    """Flushes every file and directory below `root`, then `root` and its entry."""
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))
    fsync_path(root.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, flushes it, then renames it into place."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    fsync_path(path.parent)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """`write_atomic` of a JSON document; compact unless `indent` is given."""
    separators = None if indent else (",", ":")
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    write_atomic(path, text.encode())


def read_json(path: Path, what: str) -> Any:
    """Parsed JSON file.

    Raises:
        CheckpointError: the file is missing or no JSON; the message says `what` it is.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): {what}") from None


def copy_companions(src: Path, dst: Path) -> None:
    """Copies tokenizer files and folders of `src` that exist."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            write_atomic(dst / name, (src / name).read_bytes())
    for name in TOKENIZER_FOLDERS:
        if (src / name).is_dir():
            shutil.copytree(src / name, dst / name, dirs_exist_ok=True)


def remove_companions(dst: Path) -> None:
    """Removes what `copy_companions` may have put there."""
    for name in TOKENIZER_FILES:
        (dst / name).unlink(missing_ok=True)
    for name in TOKENIZER_FOLDERS:
        if (dst / name).is_dir():
            shutil.rmtree(dst / name)


def check_separate(src: Path, dst: Path) -> None:
    """Refuses source and destination that are the same directory or lie inside each other."""
    a, b = src.resolve(), dst.resolve()
    if a == b:
        raise CheckpointError(f"SRC and DST are the same directory {a}: choose another DST")
    if a in b.parents:
        raise CheckpointError(f"DST {b} lies inside SRC {a}: choose a directory outside of it")
    if b in a.parents:
        raise CheckpointError(f"SRC {a} lies inside DST {b}: choose another DST")


def check_space(path: Path, needed: int) -> None:
    """Refuses early when the file system of `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if needed > free:
        raise CheckpointError(
            f"no space left on the device for {path}: {needed / 1e9:.2f} GB are still to be "
            f"written and {free / 1e9:.2f} GB are free"
        )


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock file for the length of the block; the system drops it when the process dies.

    Raises:
        CheckpointError: another process holds it.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is writing {path.parent}: wait for it"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:  # a file system without locks
                raise
        yield
