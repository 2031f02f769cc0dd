"""What the scheduler tells the loop to run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv4_jax.serving.engine.checkpoints import Handle
from dsv4_jax.serving.engine.request import Request


@dataclass(frozen=True, slots=True)
class SlotStart:
    """The slot now belongs to `request`, whose state begins at `position`.

    The ring state comes from `checkpoint`; None is an empty state at position 0, or what was parked
    and is there already (`is_resumed`). Behind the prompt the slot's last token is the last one of
    `request.tokens`. Penalties count from `request.tokens`.
    """

    slot: int
    request: Request
    position: int
    checkpoint: Handle | None
    is_resumed: bool = False


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copies the rows of the first `tokens` tokens of a page."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """Entries `first`, `first` + 1, … of the slot's page table."""

    slot: int
    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Tokens at positions `start`, `start` + 1, … of one sequence.

    `pages` is its table up to the last of them. The row that ends the prefill `samples` the next
    token, which stays on the device as the slot's last token.
    """

    slot: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool
    request: Request


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Computes the slot's last token, samples the one behind it, and goes on while guesses stand.

    The device knows where the slot stands. Nothing is computed from position `stop` on, so of
    `width` tokens that it may be there can be less, or none.
    """

    slot: int
    stop: int
    width: int
    request: Request


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies the slot's ring state, which then stands at `position`, to `checkpoint`."""

    slot: int
    position: int
    checkpoint: Handle


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, to be run in the order of the fields.

    Copies read all their sources before they write. `chunk`, `prefill_batch` and `decode_batch` are
    the compiled sizes that hold the rows, 0 without rows; padding goes to the scratch slot and
    page. A slot has at most one row. A plan without rows still has starts or snapshots. `width`:
    tokens that the program of the decoding rows computes of each, all at once or as a `burst`.
    """

    step: int
    starts: tuple[SlotStart, ...]
    copies: tuple[PageCopy, ...]
    tables: tuple[TableUpdate, ...]
    prefill: tuple[PrefillRow, ...]
    chunk: int
    prefill_batch: int
    decode: tuple[DecodeRow, ...]
    decode_batch: int
    width: int
    burst: bool
    snapshots: tuple[Snapshot, ...]

    @property
    def context(self) -> int:
        """Tokens of the longest sequence behind this step, to choose the attention's length."""
        ends = [row.start + len(row.tokens) for row in self.prefill]
        return max(ends + [row.stop for row in self.decode], default=0)

    @property
    def num_tokens(self) -> int:
        decoded = sum(row.width for row in self.decode)
        return sum(len(row.tokens) for row in self.prefill) + decoded

    @property
    def sampling_slots(self) -> tuple[int, ...]:
        """Slots of which the step's result holds tokens."""
        slots = [row.slot for row in self.prefill if row.samples]
        return tuple(slots + [row.slot for row in self.decode])


@dataclass
class Draft:
    """A plan under construction."""

    starts: list[SlotStart] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    tables: list[TableUpdate] = field(default_factory=list)
    prefill: list[PrefillRow] = field(default_factory=list)
    chunk: int = 0
    prefill_batch: int = 0
    decode: list[DecodeRow] = field(default_factory=list)
    width: int = 1
    burst: bool = False
    snapshots: list[Snapshot] = field(default_factory=list)

    def finish(self, step: int, decode_batches: Sequence[int]) -> StepPlan:
        return StepPlan(
            step=step,
            starts=tuple(self.starts),
            copies=tuple(self.copies),
            tables=tuple(self.tables),
            prefill=tuple(self.prefill),
            chunk=self.chunk,
            prefill_batch=self.prefill_batch,
            decode=tuple(self.decode),
            decode_batch=bucket(len(self.decode), decode_batches),
            width=self.width,
            burst=self.burst,
            snapshots=tuple(self.snapshots),
        )


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `count`; 0 for none."""
    assert count <= sizes[-1], f"{count} rows do not fit into {sizes[-1]}"
    return sizes[bisect_left(sizes, count)] if count else 0
