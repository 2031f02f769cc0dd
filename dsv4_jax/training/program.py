"""What a training program computes: the static choices that a phase makes."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.training.distill import Distill
from dsv4_jax.training.grpo import Grpo
from dsv4_jax.training.precision import Precision
from sharding.shards import SINGLE, Shards

REMAT = ("none", "group")
ROUTES = ("live", "given")


@dataclass(frozen=True)
class Program:
    """Static arguments of the training forward pass; hashable.

    sparse: CSA layers attend to what their indexer selects; else to every visible compressed row.
    index_loss: indexers learn (and run, even where nothing is selected).
    index_only: nothing but indexers learns; other losses are not computed.
    mtp: the MTP block runs and learns. mtp_only: nothing else does; other losses are not computed.
    drafts: times that the block runs, each over the streams that it gave before.
    random_index: selections disregard what indexers found (to see what hangs on them).
    objective: what is learnt from text; None: to predict the next token. With another one the MTP
        block goes on learning to predict that text, by itself: nothing else learns from its loss.
    remat: "group": the backward pass recomputes each layer group from its input; "none": it keeps
        everything.
    shards: the mesh that a step runs on. Inside it, functions see one device's part of everything.

    Raises:
        ValueError: an unknown choice, or choices that contradict each other.
    """

    cfg: ModelConfig
    precision: Precision = Precision()
    sparse: bool = True
    index_loss: bool = True
    index_only: bool = False
    mtp: bool = True
    mtp_only: bool = False
    drafts: int = 1
    random_index: bool = False
    objective: Grpo | Distill | None = None
    remat: str = "none"
    shards: Shards = SINGLE

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} must be one of {REMAT}")
        if self.index_only and not self.index_loss:
            raise ValueError("index_only needs index_loss: nothing would learn")
        if self.random_index and (self.index_loss or not self.sparse):
            raise ValueError("random_index is for sparse attention without index_loss")
        if (self.index_only or self.mtp_only) and self.objective is not None:
            raise ValueError("index_only and mtp_only learn from no objective: leave it out")
        if self.drafts < 1:
            raise ValueError(f"drafts={self.drafts} must be positive")
        if self.mtp_only and (not self.mtp or self.index_loss):
            raise ValueError("mtp_only needs mtp, and no index_loss")
        if self.mtp and not self.cfg.num_mtp_layers:
            raise ValueError("mtp needs a model with an MTP block (num_mtp_layers is 0)")

    @property
    def num(self) -> Numerics:
        return self.precision.num
