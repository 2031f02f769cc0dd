"""Checked files under names, bounded in size: what caches keep when the process ends.

A file that is damaged, cut short or of another model is as good as none: it is removed, counted,
and whoever asked computes again. Files may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)
MAGIC = b"dsv4 blob 1\n"
LENGTH_BYTES, DIGEST_BYTES = 4, 16
LOCK, UNFINISHED = "lock", ".part"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{2,199}")
BACKLOG_BYTES = 1 << 30  # waiting to be written; more is refused


class Blob(NamedTuple):
    """What was put: a few values of JSON, and bytes."""

    meta: dict[str, Any]
    payload: memoryview


def check_folder(folder: str | Path) -> None:
    """Makes a folder, if need be, and sees that a store could use it.

    Raises:
        ValueError: it could not.
    """
    os.close(_take(Path(folder)))


def _take(folder: Path) -> int:
    """Locks a folder; returns the descriptor that holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        guard = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ValueError(f"cannot use {folder}: {error.strerror}") from None
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(guard)
        raise ValueError(f"{folder} is in use by another process") from None
    return guard


class BlobStore:
    """Files of one folder, shared by models of different fingerprints, used by one process.

    Args:
        folder: Made if it is not there.
        fingerprint: Changes with anything that changes what a name stands for.
        capacity: Bytes of all files together; the least recently used go first.
        count: Called with "write", "evict", "corrupt", "refuse" (the backlog is full) or "error".

    Raises:
        ValueError: the folder cannot be used, or another process uses it.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: str,
        capacity: int,
        count: Callable[[str], object] = lambda event: None,
    ) -> None:
        if not NAME.fullmatch(fingerprint.replace("_", "-")):
            raise ValueError(f"fingerprint {fingerprint!r} is no name for a folder")
        self.folder, self.capacity = Path(folder), capacity
        self.used = 0  # bytes
        self._fingerprint, self._count = fingerprint, count
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = (
            OrderedDict()
        )  # path in the folder → size, oldest first
        self._queue: deque[tuple[str, Mapping[str, Any], Sequence[Any], int]] = deque()
        self._waiting: dict[str, int] = {}  # names in the queue → bytes
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._guard = _take(self.folder)
        self._scan()
        self._writer = threading.Thread(target=self._write_all, name="blobs", daemon=True)
        self._writer.start()

    @property
    def is_ready(self) -> bool:
        """Whether the writer keeps up; if not, it is better to wait with `put`."""
        with self._lock:
            return sum(self._waiting.values()) <= BACKLOG_BYTES // 2

    # Reading.

    def names(self) -> list[str]:
        """What is here for this fingerprint."""
        begin = f"{self._fingerprint}/"
        with self._lock:
            return [path.rsplit("/", 1)[1] for path in self._files if path.startswith(begin)]

    def has(self, name: str) -> bool:
        """Whether it is here or about to be."""
        with self._lock:
            return name in self._waiting or self._path(name) in self._files

    def get(self, name: str) -> Blob | None:
        """Reads and checks a file; None if it is not here or not what it should be."""
        path = self._path(name)
        try:
            data = (self.folder / path).read_bytes()
        except FileNotFoundError:
            self._forget(path)
            return None
        except OSError as error:
            self._count("error")
            log.warning("cannot read %s: %s", self.folder / path, error)
            return None
        blob = self._checked(name, data)
        if blob is None:
            self._count("corrupt")
            log.warning("%s is damaged and will be removed", self.folder / path)
            self.drop(name)
            return None
        self._touch(path)
        return blob

    # Writing.

    def put(self, name: str, meta: Mapping[str, Any], parts: Sequence[Any]) -> bool:
        """Has `parts`, bytes or contiguous arrays that nobody changes, written behind the scenes.

        Returns:
            Whether it is here or will be: not if too much waits already, or after `close`.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a file")
        size = sum(memoryview(part).nbytes for part in parts)
        with self._lock:
            if name in self._waiting or self._path(name) in self._files:
                return True
            refused = self._closing or sum(self._waiting.values()) + size > BACKLOG_BYTES
            if not refused:
                self._queue.append((name, meta, parts, size))
                self._waiting[name] = size
                self._wake.notify_all()
        if refused:
            self._count("refuse")
        return not refused

    def drop(self, name: str) -> None:
        """Removes a file, if it is there."""
        path = self._path(name)
        self._forget(path)
        self._unlink(path)

    def clear(self, beginnings: tuple[str, ...], timeout_s: float = 10.0) -> None:
        """Removes the files of this fingerprint whose names begin so, and those on their way."""
        with self._wake:
            kept = deque(job for job in self._queue if not job[0].startswith(beginnings))
            for name, *_ in self._queue:
                if name.startswith(beginnings):
                    del self._waiting[name]
            self._queue = kept
            written = [name for name in self._waiting if name.startswith(beginnings)]
            self._wake.wait_for(lambda: not any(n in self._waiting for n in written), timeout_s)
        for name in self.names():
            if name.startswith(beginnings):
                self.drop(name)

    def flush(self, timeout_s: float) -> bool:
        """Waits until everything is written, but not longer; tells whether it is."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._waiting, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Writes what waits, as far as time allows, and leaves the folder to others."""
        self.flush(timeout_s)
        with self._wake:
            self._closing = True
            self._queue.clear()
            self._wake.notify_all()
        self._writer.join(timeout_s)
        os.close(self._guard)

    # Inside.

    def _scan(self) -> None:
        """Finds what earlier processes left; removes what they did not finish."""
        found: list[tuple[float, str, int]] = []
        for path in self.folder.glob("*/*/*"):
            if path.suffix == UNFINISHED:
                self._unlink(str(path.relative_to(self.folder)))
            elif path.is_file():
                stat = path.stat()
                found.append((stat.st_mtime, str(path.relative_to(self.folder)), stat.st_size))
        for _, path, size in sorted(found):
            self._files[path] = size
            self.used += size
        self._make_room()

    def _path(self, name: str) -> str:
        return f"{self._fingerprint}/{blake2b(name.encode(), digest_size=1).hexdigest()}/{name}"

    def _touch(self, path: str) -> None:
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
        try:
            os.utime(self.folder / path)
        except OSError:
            self._forget(path)  # it was deleted meanwhile

    def _forget(self, path: str) -> None:
        with self._lock:
            self.used -= self._files.pop(path, 0)

    def _unlink(self, path: str) -> None:
        try:
            (self.folder / path).unlink(missing_ok=True)
        except OSError as error:
            self._count("error")
            log.warning("cannot remove %s: %s", self.folder / path, error)

    def _checked(self, name: str, data: bytes) -> Blob | None:
        body, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        start = len(MAGIC) + LENGTH_BYTES
        if len(body) < start or blake2b(body, digest_size=DIGEST_BYTES).digest() != digest:
            return None
        end = start + int.from_bytes(body[len(MAGIC) : start], "little")
        if body[: len(MAGIC)] != MAGIC or end > len(body):
            return None
        head = json.loads(bytes(body[start:end]))
        if (head["name"], head["fingerprint"]) != (name, self._fingerprint):
            return None
        return Blob(head["meta"], body[end:])

    def _write_all(self) -> None:
        """The writer's thread."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                name, meta, parts, _ = self._queue.popleft()
            try:
                size = self._write(name, meta, parts)
            except OSError as error:
                self._count("error")
                log.warning("cannot write to %s: %s", self.folder, error)
                size = None
            if size is not None:
                with self._lock:
                    self._files[self._path(name)] = size
                    self.used += size
                self._count("write")
                self._make_room()
            with self._wake:
                del self._waiting[name]
                self._wake.notify_all()

    def _write(self, name: str, meta: Mapping[str, Any], parts: Sequence[Any]) -> int:
        """Writes a file that is whole from the moment it has its name; returns its size."""
        target = self.folder / self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = target.with_name(f"{blake2b(name.encode()).hexdigest()[:32]}{UNFINISHED}")
        head = {"name": name, "fingerprint": self._fingerprint, "meta": meta}
        text = json.dumps(head).encode()
        digest, size = blake2b(digest_size=DIGEST_BYTES), 0
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            for part in (MAGIC, len(text).to_bytes(LENGTH_BYTES, "little"), text, *parts):
                view = memoryview(part).cast("B")
                digest.update(view)
                size += file.write(view)
            size += file.write(digest.digest())
        os.replace(unfinished, target)
        return size

    def _make_room(self) -> None:
        while True:
            with self._lock:
                if self.used <= self.capacity or not self._files:
                    return
                path, size = self._files.popitem(last=False)
                self.used -= size
            self._unlink(path)
            self._count("evict")
