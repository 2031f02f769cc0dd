"""Sizes and limits of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4_jax.serving.engine.units import UNIT
from dsv4_jax.serving.engine.waiting import QueueLimits


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes and limits; every compiled shape is named here.

    Args:
        num_slots: Requests that can have state on the device.
        max_len: Tokens of the longest sequence, prompt and output.
        decode_batches: Compiled numbers of decode rows, ascending; the last is at least num_slots.
        chunk_sizes: Compiled prefill lengths, ascending multiples of 128.
        prefill_batches: Compiled numbers of prefill rows, ascending.
        tail_shape: Compiled rows and tokens of a chunk that several prompts share: what is left of
            each behind its last multiple of 128, where that is no more than these tokens. Whether
            tokens are computed in it follows from their own prompt alone. None: prompts never
            share a chunk for that reason.
        step_tokens: Tokens of a step in which anybody decodes, padding of prefill included.
        checkpoint_every: Distance of regular checkpoints in tokens, a multiple of 128.
        reserve_tokens: Room for output, on top of the prompt, that must exist to start.
        long_prefill: Prompts above this many tokens count as long;
        max_long_prefills: only so many of them are prefilled at once.
        ageing_s: Waiting that counts as much as one step of priority.
        quantum: Cost a tenant may use up in one turn.
        guesses: Tokens a step may verify beside the newest one; see `pace`.
        burst: Tokens that a step decodes of each row, one after the other, while no prompt waits;
            not together with guesses.
        queue: Bounds of the queue.

    Raises:
        ValueError: a size breaks one of these rules.
    """

    num_slots: int
    max_len: int
    decode_batches: tuple[int, ...]
    chunk_sizes: tuple[int, ...] = (128, 512, 2048)
    prefill_batches: tuple[int, ...] = (1,)
    tail_shape: tuple[int, int] | None = None
    step_tokens: int = 2048
    checkpoint_every: int = 4096
    reserve_tokens: int = 1024
    long_prefill: int = 128 * 1024
    max_long_prefills: int = 2
    ageing_s: float = 30.0
    quantum: int = 4096
    guesses: int = 0
    burst: int = 1
    queue: QueueLimits = field(default_factory=QueueLimits)

    def __post_init__(self) -> None:
        for name in ("decode_batches", "chunk_sizes", "prefill_batches"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
                raise ValueError(f"{name}={sizes} must be positive and ascending")
        for name in ("num_slots", "max_len", "max_long_prefills", "ageing_s", "quantum"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.guesses < 0:
            raise ValueError(f"guesses={self.guesses} must not be negative")
        if self.burst < 1 or (self.burst > 1 and self.guesses):
            raise ValueError(
                f"burst={self.burst} must be at least 1, and 1 beside guesses={self.guesses}"
            )
        for size in (self.checkpoint_every, *self.chunk_sizes):
            if size < UNIT or size % UNIT:
                raise ValueError(
                    f"chunk or checkpoint distance {size} must be a multiple of {UNIT}"
                )
        if self.tail_shape is not None:
            rows, tokens = self.tail_shape
            if rows < 1 or not 0 < tokens <= UNIT or rows * tokens > self.step_tokens:
                raise ValueError(
                    f"tail_shape={self.tail_shape} must hold rows of 1 to {UNIT} tokens, and "
                    f"no more than step_tokens={self.step_tokens} in all"
                )
        if self.decode_batches[-1] < self.num_slots:
            raise ValueError(f"decode_batches must reach num_slots={self.num_slots}")
