import random

import pytest

from dsv4_jax.serving.engine.pages import SCRATCH_PAGE, PageAllocator


def test_the_scratch_page_is_never_given_out():
    pages = PageAllocator(5)
    assert sorted(pages.allocate(4)) == [1, 2, 3, 4]
    assert pages.num_free == pages.num_obtainable == 0
    with pytest.raises(AssertionError, match="1 pages asked for, 0 free"):
        pages.allocate(1)


def test_a_page_is_free_when_neither_sequences_nor_the_cache_hold_it():
    pages = PageAllocator(3)
    [page] = pages.allocate(1)
    pages.share(page)
    pages.cache(page)
    pages.release(page)
    pages.release(page)
    assert (pages.num_free, pages.num_held, pages.num_obtainable) == (1, 0, 2)
    pages.share(page)
    pages.uncache(page)
    assert pages.holders(page) == (1, 0)
    pages.release(page)
    assert pages.num_free == 2
    pages.check()


@pytest.mark.parametrize("operation", ["share", "release", "cache", "uncache"])
def test_what_nobody_holds_cannot_be_shared_or_given_back(operation):
    pages = PageAllocator(3)
    with pytest.raises(AssertionError, match="page 1"):
        getattr(pages, operation)(1)


@pytest.mark.parametrize(("num_pages", "page_tokens"), [(1, 128), (4, 0), (4, 100), (4, 192)])
def test_bad_sizes_are_refused(num_pages, page_tokens):
    with pytest.raises(ValueError, match="must be"):
        PageAllocator(num_pages, page_tokens)


def test_pages_are_rounded_up():
    pages = PageAllocator(4, 256)
    assert [pages.pages_for(tokens) for tokens in (0, 1, 256, 257)] == [0, 1, 1, 2]


def test_random_holders_are_conserved():
    rng = random.Random(0)
    pages = PageAllocator(12)
    sequences: list[int] = []
    cached: list[int] = []
    for _ in range(3000):
        operation = rng.choice(("allocate", "share", "release", "cache", "uncache"))
        if operation == "allocate" and pages.num_free:
            sequences += pages.allocate(rng.randint(1, pages.num_free))
        elif operation in ("share", "cache") and sequences + cached:
            page = rng.choice(sequences + cached)
            (sequences if operation == "share" else cached).append(page)
            getattr(pages, operation)(page)
        elif operation in ("release", "uncache"):
            held = sequences if operation == "release" else cached
            if held:
                getattr(pages, operation)(held.pop(rng.randrange(len(held))))
        pages.check()
        assert SCRATCH_PAGE not in sequences + cached
        assert pages.num_held == len(set(sequences))
        assert pages.num_free == 11 - len({*sequences, *cached})
