"""How much of which prompt is computed in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dsv4_jax.serving.engine.request import Request
from dsv4_jax.serving.engine.step import bucket
from dsv4_jax.serving.engine.units import UNIT

MAX_SKIPS = 4  # steps a prefill may be passed over by shorter ones


def prefill_order(requests: Iterable[Request]) -> list[Request]:
    """Shortest remaining first, but nobody is passed over more than a few times in a row."""

    def key(request: Request) -> tuple[bool, int, tuple[float, int]]:
        overdue = request.skipped >= MAX_SKIPS
        return not overdue, 0 if overdue else request.target - request.planned, request.rank

    return sorted(requests, key=key)


def piece(request: Request) -> int:
    """Tokens up to the next point where a chunk has to end."""
    end = request.cuts[0] if request.cuts else request.target
    if request.planned < request.tail:
        end = min(end, request.tail)
    return end - request.planned


def tail_start(length: int, shape: tuple[int, int] | None) -> int:
    """Where the part of a prompt begins that shares its chunks; its length if it has none.

    Cached prefixes are whole units, so the part is never cached, and always computed: the same
    tokens in the same shape, whatever else was cached or waits.
    """
    rest = length % UNIT
    return length - rest if shape is not None and rest <= shape[1] else length


def same_kind(requests: Sequence[Request]) -> list[Request]:
    """The first and those of its kind: ends of prompts that share a chunk, or all else."""
    is_tail = requests[0].planned >= requests[0].tail
    return [request for request in requests if (request.planned >= request.tail) == is_tail]


def choose_chunk(
    pieces: Sequence[int], budget: int, chunks: Sequence[int], batches: Sequence[int]
) -> tuple[int, int]:
    """Chooses the compiled shape that does the most useful work within a budget.

    The rows go to the first pieces in order. The smallest shape is always within the budget, so
    that prefill cannot be starved by decoding.

    Args:
        pieces: Tokens each sequence could use, not empty.
        budget: Tokens, padding included.
        chunks: Compiled chunk sizes, ascending multiples of 128.
        batches: Compiled numbers of rows, ascending.

    Returns:
        Chunk size and number of rows that are used.
    """
    best, choice = (0, 0), (0, 0)
    for chunk in chunks:
        for batch in batches:
            is_smallest = (chunk, batch) == (chunks[0], batches[0])
            if chunk * batch > budget and not is_smallest:
                break
            rows = min(batch, len(pieces))
            useful = sum(min(chunk, size) for size in pieces[:rows])
            score = useful, -chunk * bucket(rows, batches)
            if score > best:
                best, choice = score, (chunk, rows)
    return choice


def cut_points(
    request: Request, resumed: int, every: int, split: int, is_cached: Callable[[int], bool]
) -> list[int]:
    """Positions of the prompt after which a checkpoint is taken, ascending.

    Args:
        request: Its `checkpoints` are rounded down to units; without any, the end of the prompt
            stands in for them.
        resumed: Where the computation starts.
        every: Distance of regular checkpoints in tokens.
        split: Where the prompt leaves what others had before it, though nobody can resume there.
        is_cached: Whether there is a checkpoint at a position.
    """
    length = len(request.prompt)
    wanted = {point // UNIT * UNIT for point in request.checkpoints or (length - 1,)}
    wanted |= {split, *range(every, length, every)}
    return sorted(p for p in wanted if resumed < p <= length and not is_cached(p))
