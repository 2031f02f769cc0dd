"""Prefixes on disk: written behind the steps, read before a request's turn.

Whatever a checkpoint can be resumed from, its pages and the checkpoint itself, becomes files of a
`BlobStore`, named by the chained keys of units. A request that was queued has the files it can use
read, checked and put beside the host tier by a thread; it waits for that, then starts as if they
had been in host memory. The engine's own thread never touches the disk.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.serving.engine import device
from dsv4_jax.serving.engine.blobs import BlobStore
from dsv4_jax.serving.engine.copies import Copies, Copy
from dsv4_jax.serving.engine.host import Unit
from dsv4_jax.serving.engine.host_memory import Entry, HostMemory
from dsv4_jax.serving.engine.node import Node
from dsv4_jax.serving.engine.prefix import PrefixCache
from dsv4_jax.serving.engine.request import Request, Status
from dsv4_jax.serving.engine.runner import Runner
from dsv4_jax.serving.engine.units import UNIT

log = logging.getLogger(__name__)
PAGES_A_STEP = 8  # copied from the device for the disk
PATIENCE_S = 30.0  # a request starts without the files if they take longer
PAGE, CHECKPOINT = "p", "c"


class Layout(NamedTuple):
    """What the arrays of a page and of a checkpoint are: abstract trees."""

    page: Any
    checkpoint: Any

    @property
    def digest(self) -> str:
        leaves = jax.tree.leaves(tuple(self))
        text = repr([(leaf.dtype.name, leaf.shape) for leaf in leaves])
        return blake2b(text.encode(), digest_size=8).hexdigest()


def layout_of(state: Any) -> Layout:
    """Of the engine's `state`."""
    one, first = jnp.zeros(1, jnp.int32), jnp.int32(0)
    return Layout(
        jax.eval_shape(device.read_pages, state, one),
        jax.eval_shape(device.read_checkpoint, state, first),
    )


class DiskTier:
    """Reads and writes prefixes of one engine.

    Args:
        runner: Whose state is copied.
        cache: The tree whose nodes are written.
        host: Where what was read waits.
        store: The files.
        wake: The engine's lock; notified when a request need not wait any longer.
        clock: Seconds, as the scheduler's.
        count: Called with "hit" (a request resumes further than it could have) or "miss".
    """

    def __init__(
        self,
        runner: Runner,
        cache: PrefixCache,
        host: HostMemory,
        store: BlobStore,
        wake: threading.Condition,
        clock: Callable[[], float],
        count: Callable[[str], object],
    ) -> None:
        self.store = store
        self._runner, self._cache, self._host = runner, cache, host
        self._wake, self._clock, self._count = wake, clock, count
        self._layout = layout_of(runner.state)
        self._most_pages = cache.pages.num_usable
        self._names: dict[bytes, str] = {}  # unit's key → the longest page file that holds it
        for name in store.names():
            if name.startswith(f"{PAGE}-"):
                self._learn(name)
        self._copies = Copies(runner.programs)
        self._pending: deque[Iterator[None]] = deque()
        self._under_way: list[tuple[str, Sequence[bytes], Copy]] = []  # name, ids of units, copy
        self._reader = ThreadPoolExecutor(1, "disk")

    # Writing. All of it on the engine's thread.

    def keep(self, node: Node) -> None:
        """Queues everything a resume behind `node` needs."""
        self._pending.append(self._save(node))

    def pump(self) -> bool:
        """Takes what was copied and starts to copy a few pages more.

        Call it when a step has come back. Returns whether there is more to take.
        """
        self._copies.settle()
        for name, ids, copy in self._under_way:
            self._put(name, ids, copy.tree)
        self._under_way.clear()
        while self._pending and len(self._under_way) < PAGES_A_STEP and self.store.is_ready:
            if next(self._pending[0], self) is self:  # it has come to its end
                self._pending.popleft()
        return bool(self._under_way)

    def finish(self, timeout_s: float) -> None:
        """Pumps until nothing is left, but not longer."""
        end = time.monotonic() + timeout_s
        while (self.pump() or self._pending) and time.monotonic() < end:
            if not self.store.is_ready:
                self.store.flush(end - time.monotonic())

    def forget(self) -> None:
        """Gives up what is still to be written, and what is known of the files."""
        self._pending.clear()
        self._under_way.clear()
        self._names.clear()

    def clear(self) -> None:
        """Removes all prefixes from the disk; from any thread, behind `forget`."""
        self.store.clear((f"{PAGE}-", f"{CHECKPOINT}-"))

    def close(self) -> None:
        """Writes what is under way; nothing is read any more. The lock must not be held."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    def _save(self, node: Node) -> Iterator[None]:
        """Copies the pages of a node's path that are not on disk, then its checkpoint.

        It is resumed at later steps: what has left the tree by then cannot be copied any more.
        """
        path, inner = [], node
        while inner is not None:
            path.append(inner)
            inner = inner.parent
        path.reverse()
        size, runner = self._cache.page_units, self._runner
        for start in range(0, len(path), size):
            group = path[start : start + size]
            if self._is_kept(group[-1]):
                continue
            if not self._is_there(group[-1]):
                return
            pages = np.array([group[-1].page], np.int32)
            rows = runner.programs.read_pages(runner.state, pages)
            self._start(_page_name([n.key for n in group]), [n.ids for n in group], rows)
            yield
        name = f"{CHECKPOINT}-{node.key.hex()}"
        if self._is_there(node) and node.checkpoint is not None and not self.store.has(name):
            handle = np.int32(node.checkpoint)
            self._start(name, [node.ids], runner.programs.read_checkpoint(runner.state, handle))
            yield

    def _is_kept(self, node: Node) -> bool:
        name = self._names.get(node.key)
        return name is not None and self.store.has(name)

    def _is_there(self, node: Node) -> bool:
        return self._cache.nodes.get(node.key) is node

    def _start(self, name: str, ids: Sequence[bytes], tree: Any) -> None:
        self._under_way.append((name, ids, self._copies.add(tree)))

    def _put(self, name: str, ids: Sequence[bytes], tree: Any) -> None:
        parts = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in jax.tree.leaves(tree)]
        meta = {"ids": [base64.b85encode(one).decode() for one in ids]}
        if self.store.put(name, meta, parts) and name.startswith(PAGE):
            for shorter in self._learn(name):
                self.store.drop(shorter)

    def _learn(self, name: str) -> list[str]:
        """Notes whose rows a page file holds; returns files that hold nothing else."""
        keys = _keys_of(name)
        known = [self._names.get(key) for key in keys]
        if any(other is not None and len(other) >= len(name) for other in known):
            return []
        self._names |= dict.fromkeys(keys, name)
        return list({other for other in known if other is not None and name.startswith(other)})

    # Reading.

    def fetch(self, request: Request) -> None:
        """Has what is on disk for a queued request read; it waits. The lock is held."""
        if len(request.prompt) <= UNIT:
            return  # it computes its last token in any case
        request.held_until = self._clock() + PATIENCE_S
        self._reader.submit(self._fetch, request)

    def _fetch(self, request: Request) -> None:
        """The reader's thread."""
        found: dict[Entry, Any] = {}
        try:
            found = self._read(request)
        except Exception:  # it costs nothing but the time to compute
            log.exception("request %s: reading its prefix failed", request.id)
        with self._wake:
            if found and request.status is Status.WAITING:
                self._host.stage(request, found)
                self._count("hit")
            else:
                self._count("miss")
            request.held_until = None
            self._wake.notify_all()

    def _read(self, request: Request) -> dict[Entry, Any]:
        """What lets a request resume further on than what is in memory."""
        chain = self._cache.chain(request.tenant)
        chain.extend(request.prompt)
        most = (len(request.prompt) - 1) // UNIT
        units = list(zip(chain.keys[:most], chain.ids[:most], strict=True))
        with self._wake:
            nodes = [self._cache.at(chain, (i + 1) * UNIT) for i in range(len(units))]
            both = list(zip(nodes, units, strict=True))
            have = [node is not None or self._host.has_unit(unit) for node, unit in both]
            ends = [
                (node is not None and node.checkpoint is not None)
                or self._host.has_checkpoint(unit)
                for node, unit in both
            ]
        in_memory = max((i + 1 for i in range(_run(have)) if ends[i]), default=0)
        reach = _run([h or key in self._names for h, (key, _) in zip(have, units, strict=True)])
        pages: dict[int, Any] = {}  # by first unit
        while reach > in_memory and not request.cancelled:
            name = f"{CHECKPOINT}-{units[reach - 1][0].hex()}"
            if not (ends[reach - 1] or self.store.has(name)):
                reach -= 1
                continue
            good = self._read_pages(units[:reach], have, pages)
            if good < reach:
                reach = good
                continue
            found: dict[Entry, Any] = {}
            if not ends[reach - 1]:
                rings = self._get(name, units[reach - 1 : reach], self._layout.checkpoint)
                if rings is None:
                    reach -= 1
                    continue
                found["checkpoint", units[reach - 1]] = rings
            size = self._cache.page_units
            return found | {
                ("page", unit): page
                for start, page in pages.items()
                for unit in units[start : min(start + size, reach)]
            }
        return {}

    def _read_pages(
        self, units: Sequence[Unit], have: Sequence[bool], pages: dict[int, Any]
    ) -> int:
        """Adds the pages that these units lack; returns how many units can be had."""
        size = self._cache.page_units
        for start in range(0, len(units), size):
            end = min(start + size, len(units))
            if start in pages or all(have[start:end]):
                continue
            name = self._names.get(units[end - 1][0])
            page = None
            if name is not None and len(pages) < self._most_pages:
                page = self._get(name, units[start:end], self._layout.page)
            if page is None:
                self._forget(name)
                return start
            pages[start] = page
        return len(units)

    def _get(self, name: str, units: Sequence[Unit], layout: Any) -> Any:
        """The arrays of a file whose first units are these; None if it is no such file."""
        blob = self.store.get(name)
        if blob is None:
            return None
        ids = [base64.b85decode(one) for one in blob.meta["ids"]]
        if ids[: len(units)] != [one for _, one in units]:
            return None  # another prefix with the same key
        leaves, start = [], 0
        shapes, tree = jax.tree.flatten(layout)
        for shape in shapes:
            size = device.bytes_of(shape)
            raw = np.frombuffer(blob.payload[start : start + size], np.uint8)
            leaves.append(raw.view(shape.dtype).reshape(shape.shape))
            start += size
        return jax.tree.unflatten(tree, leaves)

    def _forget(self, name: str | None) -> None:
        """A file that cannot be read is written again when it can be."""
        if name is not None and not self.store.has(name):
            for key in _keys_of(name):
                if self._names.get(key) == name:
                    del self._names[key]


def _run(flags: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def _page_name(keys: Sequence[bytes]) -> str:
    """Units of a page are few: their keys fit into a name."""
    return "-".join([PAGE, *(key.hex() for key in keys)])


def _keys_of(name: str) -> list[bytes]:
    return [bytes.fromhex(part) for part in name.split("-")[1:]]
