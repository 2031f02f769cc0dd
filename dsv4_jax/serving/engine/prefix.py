"""The prefix cache: which pages and checkpoints hold the state of which beginnings.

A tree over units of 128 tokens. A request can resume behind a unit if all pages in front of it are
here and a checkpoint of the ring state is attached to it; nothing less is exact. With pages of
several units, a node's page holds all rows of that page up to the node, so that a hit that ends
inside a page can copy them.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count

from dsv4_jax.serving.engine.checkpoints import CheckpointStore, Handle
from dsv4_jax.serving.engine.host import HostTier, promote
from dsv4_jax.serving.engine.node import Hit, Node
from dsv4_jax.serving.engine.pages import PageAllocator
from dsv4_jax.serving.engine.units import UNIT, UnitChain


class PrefixCache:
    """Radix tree of units over one pool of pages and one store of checkpoints.

    Args:
        pages: Whose pages the tree may hold.
        store: Keeps the ring states; capacity 0 turns the cache off.
        fingerprint: Changes with anything that changes the numbers in a page.
        host: Second tier for what is evicted here.
        on_evict: Told "page" or "checkpoint" for each one that goes.
        on_attach: Told the node that got a checkpoint.
    """

    def __init__(
        self,
        pages: PageAllocator,
        store: CheckpointStore,
        fingerprint: str = "",
        host: HostTier | None = None,
        on_evict: Callable[[str], object] = lambda tier: None,
        on_attach: Callable[[Node], object] = lambda node: None,
    ) -> None:
        self.pages = pages
        self.store = store
        self.nodes: dict[bytes, Node] = {}
        self.on_evict = on_evict
        self.on_attach = on_attach
        self._fingerprint = fingerprint
        self._host = host
        self._holders: dict[bytes, Node] = {}  # nodes with a checkpoint
        self._heap: list[tuple[tuple[float, int], int, Node]] = []  # candidates, maybe outdated
        self._serial = count()
        self._uses = count()
        self._clock = 0.0
        self.page_units = pages.page_tokens // UNIT

    def chain(self, tenant: str) -> UnitChain:
        """An empty chain for a sequence of `tenant`."""
        return UnitChain(self._fingerprint, tenant)

    # Using what is there.

    def acquire(self, chain: UnitChain, limit: int) -> Hit:
        """Finds and pins the longest exact point within the first `limit` tokens."""
        path = self._walk(chain, limit // UNIT)
        if self._host is not None:
            path = promote(self._host, self, chain, path, limit // UNIT)
        matched = len(path) * UNIT
        while path and path[-1].checkpoint is None:
            path.pop()
        if not path:
            return Hit(matched=matched)
        node, size = path[-1], self.page_units
        self.pin(node)
        node.readers += 1
        return Hit(
            node,
            node.depth * UNIT,
            matched,
            pages=tuple(inner.page for inner in path[size - 1 :: size]),
            copy_from=node.page if node.depth % size else None,
        )

    def abandon(self, hit: Hit) -> None:
        """Undoes `acquire`."""
        if hit.node is not None:
            self.restored(hit.node)
            self.unpin(hit.node)

    def restored(self, node: Node) -> None:
        """Says that the checkpoint has been read; the node itself stays pinned."""
        node.readers -= 1
        self._offer(node)

    def pin(self, node: Node) -> None:
        node.pins += 1

    def unpin(self, node: Node) -> None:
        node.pins -= 1
        self._offer(node)

    # Adding to it.

    def publish(
        self, chain: UnitChain, table: list[int], units: int, last: Node | None
    ) -> Node | None:
        """Adds the first `units` units of a sequence, all of them committed.

        Args:
            chain: Keys of the sequence.
            table: Its pages in order.
            units: How many.
            last: What this returned before, or the node of the hit; pinned.

        Returns:
            The deepest of the sequence's units in the tree, pinned instead of `last`.
        """
        node, use = last, next(self._uses)
        for index in range(last.depth if last else 0, units):
            child = self.nodes.get(chain.keys[index])
            if child is None:
                child = self.insert(chain, index, node, table[index // self.page_units])
            elif child.ids != chain.ids[index] or child.parent is not node:
                break  # another unit of the same key: not to be mixed up
            self._touch(child, use)
            node = child
        if node is not last and node is not None:
            self.pin(node)
            if last is not None:
                self.unpin(last)
        return node

    def insert(self, chain: UnitChain, index: int, parent: Node | None, page: int) -> Node:
        """Adds unit `index` of the chain, whose rows and those before them are in `page`."""
        node = Node(chain.keys[index], chain.ids[index], parent, index + 1, page)
        self.nodes[node.key] = node
        self.pages.cache(page)
        if parent is not None:
            parent.children += 1
        # The new page holds the rows of the units in front too: one page is enough for all.
        inner, first = parent, index - index % self.page_units
        while inner is not None and inner.depth > first:
            if inner.page != page:
                self.pages.cache(page)
                self.pages.uncache(inner.page)
                inner.page = page
            inner = inner.parent
        self._touch(node, next(self._uses))
        self._offer(node)
        return node

    def take_checkpoint(self) -> Handle | None:
        """Reserves room for a checkpoint, if need be by evicting one; None if all are in use."""
        handle = self.store.take()
        if handle is None:
            idle = [node for node in self._holders.values() if not node.readers]
            if not idle:
                return None
            node = min(idle, key=lambda node: node.value)
            self._clock = max(self._clock, node.value[0])
            self._drop_checkpoint(node)
            self._offer(node)
            handle = self.store.take()
        return handle

    def attach(self, chain: UnitChain, position: int, handle: Handle) -> None:
        """Gives the tree the state at `position`; dropped if it is of no use there."""
        node = self.at(chain, position)
        if node is None or node.checkpoint is not None:
            self.store.drop(handle)
            return
        node.checkpoint, node.gap = handle, UNIT
        before = node.parent
        while before is not None and before.checkpoint is None:
            node.gap += UNIT
            before = before.parent
        self._holders[node.key] = node
        self._offer(node)
        self.on_attach(node)

    def at(self, chain: UnitChain, position: int) -> Node | None:
        """The node that ends at `position`, a multiple of 128."""
        index = position // UNIT - 1
        node = self.nodes.get(chain.keys[index]) if index < len(chain.keys) else None
        return node if node is not None and node.ids == chain.ids[index] else None

    # Making room.

    def evict(self, pages: int) -> bool:
        """Makes at least `pages` pages free, dropping the least valuable leaves first.

        Returns:
            Whether that many are free now.
        """
        while self.pages.num_free < pages and self._heap:
            value, _, node = heappop(self._heap)
            if self.nodes.get(node.key) is not node or not node.is_evictable:
                continue
            if value != node.value:
                self._offer(node)
                continue
            self._clock = max(self._clock, value[0])
            self._remove(node)
        return self.pages.num_free >= pages

    def flush(self) -> None:
        """Drops everything that is not in use."""
        self.evict(self.pages.num_pages)

    def check(self) -> None:
        """Asserts that counts, links and checkpoints agree with the tree."""
        children: dict[Node, int] = {}
        cached: dict[int, int] = {}
        for node in self.nodes.values():
            cached[node.page] = cached.get(node.page, 0) + 1
            if node.parent is not None:
                assert self.nodes.get(node.parent.key) is node.parent, "a parent left first"
                assert node.depth == node.parent.depth + 1, "depth is off"
                children[node.parent] = children.get(node.parent, 0) + 1
            assert min(node.pins, node.readers) >= 0, "negative pins"
            assert (node.key in self._holders) == (node.checkpoint is not None), "holders are off"
        assert all(node.children == children.get(node, 0) for node in self.nodes.values())
        assert self._holders.keys() <= self.nodes.keys(), "a checkpoint outlived its node"
        for page in range(self.pages.num_pages):
            assert self.pages.holders(page)[1] == cached.get(page, 0), f"cache count of {page}"
        queued = {node for _, _, node in self._heap}
        lost = [n for n in self.nodes.values() if n.is_evictable and n not in queued]
        assert not lost, "a leaf can never be evicted"

    @property
    def checkpoints(self) -> list[Handle]:
        """Handles the tree holds."""
        return [node.checkpoint for node in self._holders.values() if node.checkpoint is not None]

    # Inside.

    def _walk(self, chain: UnitChain, limit: int) -> list[Node]:
        """The nodes of the chain's first `limit` units, as far as they go; marks them as used."""
        path: list[Node] = []
        use, parent = next(self._uses), None
        for key, ids in zip(chain.keys[:limit], chain.ids[:limit], strict=True):
            node = self.nodes.get(key)
            if node is None or node.ids != ids or node.parent is not parent:
                break
            self._touch(node, use)
            path.append(node)
            parent = node
        return path

    def _touch(self, node: Node, use: int) -> None:
        node.touched, node.used = self._clock, use

    def _offer(self, node: Node) -> None:
        """Makes a node a candidate for eviction, if it may go."""
        if not node.is_evictable:
            return
        if len(self._heap) > 4 * len(self.nodes) + 64:
            alive = [inner for inner in self.nodes.values() if inner.is_evictable]
            self._heap = [(inner.value, next(self._serial), inner) for inner in alive]
            heapify(self._heap)
        else:
            heappush(self._heap, (node.value, next(self._serial), node))

    def _remove(self, node: Node) -> None:
        if self._host is not None and not self._host.has_unit(node.unit):
            self._host.save_page(self._units_in_page(node), node.page)
        if node.checkpoint is not None:
            self._drop_checkpoint(node)
        del self.nodes[node.key]
        before = self.pages.num_free
        self.pages.uncache(node.page)
        if self.pages.num_free > before:
            self.on_evict("page")
        if node.parent is not None:
            node.parent.children -= 1
            self._offer(node.parent)

    def _units_in_page(self, node: Node) -> list[tuple[bytes, bytes]]:
        units, inner = [], node
        for _ in range((node.depth - 1) % self.page_units + 1):
            assert inner is not None
            units.append(inner.unit)
            inner = inner.parent
        return units[::-1]

    def _drop_checkpoint(self, node: Node) -> None:
        assert node.checkpoint is not None
        if self._host is not None and not self._host.has_checkpoint(node.unit):
            self._host.save_checkpoint(node.unit, node.checkpoint)
        self.store.drop(node.checkpoint)
        del self._holders[node.key]
        node.checkpoint = None
        self.on_evict("checkpoint")
