"""Pages of compressed rows: who holds them, and which are free."""

from __future__ import annotations

from dsv4_jax.serving.engine.units import UNIT

SCRATCH_PAGE = 0  # rows of padding are written here


class PageAllocator:
    """Counts the holders of every page; a page without any is free.

    Sequences hold the pages of their tables, the prefix cache holds what it may hand out again. The
    two are counted apart, so that it is known how much the cache could give back. Page 0 belongs to
    nobody.

    Args:
        num_pages: Pages on the device, page 0 included.
        page_tokens: Tokens a page covers: a multiple of 128, so that every kind of compressed row
            begins with the page.

    Raises:
        ValueError: there is no page to give, or pages do not consist of whole units.
    """

    def __init__(self, num_pages: int, page_tokens: int = UNIT) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is for padding")
        if page_tokens < UNIT or page_tokens % UNIT:
            raise ValueError(f"page_tokens={page_tokens} must be a multiple of {UNIT}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.num_held = 0  # pages in the table of at least one sequence
        self._free = list(range(num_pages - 1, SCRATCH_PAGE, -1))
        self._sequences = [0] * num_pages
        self._cache = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """Pages there are to give out in total."""
        return self.num_pages - 1

    @property
    def num_obtainable(self) -> int:
        """Pages that are free or held by the cache alone."""
        return self.num_usable - self.num_held

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[int]:
        """Takes free pages for the table of one sequence; there must be enough of them."""
        assert count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._sequences[page] = 1
        self.num_held += count
        return taken

    def share(self, page: int) -> None:
        """Adds a page that somebody holds to the table of one more sequence."""
        assert self._sequences[page] or self._cache[page], f"page {page} is free"
        self.num_held += self._sequences[page] == 0
        self._sequences[page] += 1

    def release(self, page: int) -> None:
        """Takes a page out of the table of one sequence."""
        assert self._sequences[page] > 0, f"no sequence holds page {page}"
        self._sequences[page] -= 1
        self.num_held -= self._sequences[page] == 0
        self._free_if_unheld(page)

    def cache(self, page: int) -> None:
        """Counts one more cached unit in a page that somebody holds."""
        assert self._sequences[page] or self._cache[page], f"page {page} is free"
        self._cache[page] += 1

    def uncache(self, page: int) -> None:
        """Counts one cached unit less."""
        assert self._cache[page] > 0, f"the cache does not hold page {page}"
        self._cache[page] -= 1
        self._free_if_unheld(page)

    def holders(self, page: int) -> tuple[int, int]:
        """Returns how many sequences and how many cached units hold the page."""
        return self._sequences[page], self._cache[page]

    def check(self) -> None:
        """Asserts that every page is either free, once, or held."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert SCRATCH_PAGE not in free, "the scratch page was freed"
        for page, held in enumerate(zip(self._sequences, self._cache, strict=True)):
            assert min(held) >= 0, f"page {page} has negative counts {held}"
            expected = page != SCRATCH_PAGE and held == (0, 0)
            assert (page in free) == expected, f"page {page}: holders {held}, free {page in free}"
        assert self.num_held == sum(count > 0 for count in self._sequences), "num_held is off"

    def _free_if_unheld(self, page: int) -> None:
        if self._sequences[page] == 0 and self._cache[page] == 0:
            self._free.append(page)
