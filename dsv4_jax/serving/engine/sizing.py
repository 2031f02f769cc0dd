"""From a few settings to the engine's sizes, and what they cost in memory."""

from __future__ import annotations

from dsv4_jax.attention import FEW_QUERIES
from dsv4_jax.cache import page_unit
from dsv4_jax.config import CSA, ModelConfig
from dsv4_jax.kernels import PACKED_PAGE
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import Sizes, memory
from dsv4_jax.serving.engine.units import UNIT
from dsv4_jax.serving.engine.waiting import QueueLimits
from sharding.shards import SINGLE, Shards

CHUNK = 256  # tokens of a prompt computed in one step
CHECKPOINTS = 64
CACHED_CONTEXTS = 2  # full-length contexts that the default page pool holds


def page_for(num: Numerics) -> int:
    """Tokens of a page: as few as can be, but kernels read CSA layers' rows a whole tile at a time.

    From smaller pages they would be copied first, all that the sequences have room for.
    """
    return max(CSA * PACKED_PAGE, UNIT) if num.kernels and num.packed_cache else UNIT


def plan_sizes(
    cfg: ModelConfig,
    max_len: int,
    slots: int,
    cache_tokens: int | None = None,
    page_tokens: int = UNIT,
    guesses: int = 0,
    rejects: bool = False,
    burst: int = 1,
) -> tuple[SchedulerConfig, Sizes]:
    """Sizes for `slots` requests at a time and a cache of `cache_tokens` tokens.

    One decode shape, one chunk shape, and one for ends of prompts: which of them computes a token
    follows from its own request, so what a request computes does not depend on the load.

    Raises:
        ValueError: the cache cannot hold one request of `max_len`, slots is not positive, or
            `guesses` are more than a step can verify or the model can make, or there is a `burst`
            beside them.
    """
    if slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    if guesses and not cfg.num_mtp_layers:
        raise ValueError(f"guesses={guesses} need an MTP block, which this model lacks")
    if not 0 <= guesses < FEW_QUERIES:
        raise ValueError(f"guesses={guesses} must lie between 0 and {FEW_QUERIES - 1}")
    if UNIT % page_unit(cfg):
        raise ValueError(
            f"compress_ratios need pages of {page_unit(cfg)} tokens; the server's are {UNIT}"
        )
    needed = -(-max_len // page_tokens) * page_tokens
    cache_tokens = CACHED_CONTEXTS * needed if cache_tokens is None else cache_tokens
    if cache_tokens < needed:
        raise ValueError(
            f"a cache of {cache_tokens} tokens cannot hold one context of {max_len}: the largest "
            f"context that fits is {cache_tokens // page_tokens * page_tokens}"
        )
    scheduling = SchedulerConfig(
        num_slots=slots,
        max_len=max_len,
        decode_batches=(slots,),
        chunk_sizes=(CHUNK,),
        tail_shape=(min(CHUNK // UNIT, slots), UNIT),
        step_tokens=CHUNK + slots * max(1 + guesses, burst),
        queue=QueueLimits(),
        guesses=guesses,
        burst=burst,
    )
    pages = 1 + cache_tokens // page_tokens  # page 0 is scratch
    sizes = Sizes(slots, pages, page_tokens, max_len, CHECKPOINTS, guesses, rejects, burst)
    return scheduling, sizes


def memory_plan(
    cfg: ModelConfig, num: Numerics, sizes: Sizes, shards: Shards = SINGLE, decoded: bool = False
) -> str:
    """What each device holds, by use, as a line to show; `decoded`: see `device.memory`."""
    plan = memory(cfg, num, sizes, shards, decoded)
    tokens = (sizes.pages - 1) * sizes.page_tokens
    parts = (
        f"weights {_size(plan.weights)}{' (decoded once)' if decoded else ''}",
        f"{sizes.slots} slots {_size(plan.slots)}",
        f"cache of {tokens:,} tokens {_size(plan.pages)}",
        f"{sizes.checkpoints} checkpoints {_size(plan.checkpoints)}",
    )
    return ", ".join(parts)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
