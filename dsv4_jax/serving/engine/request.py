"""One request as the engine sees it: its tokens, limits, progress and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from typing import Any

from dsv4_jax.serving.engine.node import Node
from dsv4_jax.serving.engine.units import UnitChain


class Status(Enum):
    """Where a request is. PREFILL and RUNNING ones own a slot and pages, the others nothing."""

    WAITING = auto()
    PREFILL = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    QUEUE_TIMEOUT = "queue_timeout"
    SHUTDOWN = "shutdown"
    ERROR = "error"


@dataclass(eq=False)
class Times:
    """Seconds on the engine's clock; None until it happens. `started` is the first admission."""

    arrived: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


@dataclass(eq=False, repr=False)
class Request:
    """What was asked for and how far it got.

    `tokens` is the log: the prompt, then every token that was generated. The state of a request
    that lost its slot is parked, and it goes on from there; it never draws a token twice.

    Args:
        id: Unique among the requests that are not finished.
        prompt: Token ids, at least one.
        max_tokens: Tokens to generate at most; 0 only computes the prompt.
        tenant: Whose turn it takes in the queue, and whose cached prefixes it may use.
        priority: One step counts as much as `ageing_s` of waiting, within a tenant.
        stop_ids: Generated tokens that end the request (they stay in the log).
        checkpoints: Prompt positions at which others are likely to resume.
        keep_output: The next request of this conversation will contain the output as it is.
        guided: What may be drawn next depends on what was drawn before, so a step is planned only
            once the token in front of it is known.
        early: So many tokens of output are drawn one a step: what may be drawn differs for them.
        reuse_prefix: May start behind a cached prefix; off where all prompt logits are needed.
        continues: An answer that has begun: it is not refused, however many wait.
        leader: A request with the same prompt to wait for, since its prefix will be cached.
        payload: Whatever the loop needs: sampling settings, a parser. Not looked at.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int
    tenant: str = ""
    priority: int = 0
    stop_ids: frozenset[int] = frozenset()
    checkpoints: Sequence[int] = ()
    keep_output: bool = False
    guided: bool = False
    early: int = 0
    reuse_prefix: bool = True
    continues: bool = False
    leader: Request | None = None
    payload: Any = None

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    order: int = 0  # of arrival
    urgency: float = 0.0
    limit: int = 0  # tokens the log may grow to
    cached_tokens: int = 0  # of the prompt, restored instead of computed at the first admission
    preemptions: int = 0
    parked: int = 0  # tokens whose state waits in the parking
    cancelled: bool = False
    held_until: float | None = None  # on the engine's clock: while its prefix is being read
    # What it holds while it has a slot.
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    target: int = 0  # tokens to prefill
    tail: int = 0  # from here on in chunks that prompts share; the prompt's end if it has none
    planned: int = 0  # tokens whose computation has been handed out, at most
    least: int = 0  # and at least: guesses may fail
    ahead: int = 0  # tokens that decoding rows without results may compute
    snapped: int = 0  # where the newest snapshot of the output was asked for
    committed: int = 0  # tokens whose rows are known to be right
    cuts: list[int] = field(default_factory=list)  # where chunks end for a checkpoint
    skipped: int = 0  # steps whose prefill went to others
    in_flight: int = 0  # rows of steps whose results are not in
    chain: UnitChain | None = None
    pin: Node | None = None  # deepest cached unit it shares or published
    output_checkpoint: tuple[int, int] | None = None  # newest (position, handle) in the output

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id}: the prompt must hold at least one token")
        if self.max_tokens < 0:
            raise ValueError(
                f"request {self.id}: max_tokens={self.max_tokens} must not be negative"
            )
        self.tokens = list(self.prompt)

    def __repr__(self) -> str:
        """Without tokens: they belong to the client, and there may be a million."""
        tokens = f"{len(self.prompt)}+{self.num_generated}"
        return f"Request({self.id!r}, {self.status.name}, tokens={tokens}, slot={self.slot})"

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def is_live(self) -> bool:
        """Whether it owns a slot."""
        return self.slot is not None

    @property
    def rank(self) -> tuple[float, int]:
        """Sorts the most urgent first; never changes, so waiting is rewarded and none starves."""
        return -self.urgency, self.order

    def cancel(self) -> None:
        """Asks for its end at the next step; may be called from any thread, any number of times."""
        self.cancelled = True
