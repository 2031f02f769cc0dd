"""A second tier of the prefix cache, in host memory or on disk: what it offers, how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.node import Node
from dsv4_jax.serving.engine.units import UNIT, UnitChain

if TYPE_CHECKING:
    from dsv4_jax.serving.engine.prefix import PrefixCache

Unit = tuple[bytes, bytes]  # key and ids


class HostTier(Protocol):
    """Keeps copies of what the device tier evicts, and decides itself what to forget.

    Calls come while a step is being planned. What `save_*` is given may be overwritten by that
    step, and what `load_*` fills is read by it: both must be queued on the device in front of it.
    """

    def save_page(self, units: Sequence[Unit], page: int) -> None:
        """Copies the rows of the page's first `len(units)` units."""
        ...

    def has_unit(self, unit: Unit) -> bool:
        """Whether a page that ends with this unit or goes beyond it is here."""
        ...

    def load_page(self, unit: Unit, page: int) -> None:
        """Fills the rows of the page from its beginning to the end of `unit`."""
        ...

    def save_checkpoint(self, unit: Unit, handle: Handle) -> None:
        """Copies the ring state behind `unit`."""
        ...

    def has_checkpoint(self, unit: Unit) -> bool: ...

    def load_checkpoint(self, unit: Unit, handle: Handle) -> None: ...


def promote(
    host: HostTier, cache: PrefixCache, chain: UnitChain, path: list[Node], limit: int
) -> list[Node]:
    """Loads what is missing up to the deepest point the host tier can help to resume.

    Args:
        host: The second tier.
        cache: Where things go.
        chain: Keys of the sequence that asks.
        path: Its units that are in the cache.
        limit: Units it can use.

    Returns:
        The path, as far as it goes now.
    """
    units = list(zip(chain.keys[:limit], chain.ids[:limit], strict=True))
    reach = len(path)
    while reach < len(units) and host.has_unit(units[reach]):
        reach += 1
    while reach and not host.has_checkpoint(units[reach - 1]):
        if reach <= len(path) and path[reach - 1].checkpoint is not None:
            return path
        reach -= 1
    if not reach:
        return path
    path = _load_pages(host, cache, chain, path, reach)
    if len(path) < reach or path[reach - 1].checkpoint is not None:
        return path
    node = path[reach - 1]
    cache.pin(node)  # room for its checkpoint must not cost the node
    handle = cache.take_checkpoint()
    if handle is not None:
        host.load_checkpoint(node.unit, handle)
        cache.attach(chain, reach * UNIT, handle)
    cache.unpin(node)
    return path


def _load_pages(
    host: HostTier, cache: PrefixCache, chain: UnitChain, path: list[Node], reach: int
) -> list[Node]:
    """Brings in units until `reach` are there, page by page, or the pages run out."""
    path = list(path)
    while len(path) < reach:
        start = len(path)
        end = min(start - start % cache.page_units + cache.page_units, reach)
        last = path[-1] if path else None
        if last is not None:
            cache.pin(last)
        if cache.evict(1):
            [page] = cache.pages.allocate(1)
            host.load_page((chain.keys[end - 1], chain.ids[end - 1]), page)
            for index in range(start, end):
                path.append(cache.insert(chain, index, path[-1] if path else None, page))
            cache.pages.release(page)
        if last is not None:
            cache.unpin(last)
        if len(path) == start:
            break
    return path
