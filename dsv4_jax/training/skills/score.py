"""What a model has learnt: exact answers by skill, mode and length, without serving it.

An answer is exact if every one of its tokens is the model's first choice given the right tokens in
front of it. That is what writing it at temperature 0 gives, so one forward pass tells; reasoning
counts as part of the answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model
from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.batch import Batch, from_fields
from dsv4_jax.training.data.documents import Document, tokenise
from dsv4_jax.training.forward import forward
from dsv4_jax.training.program import Program

SHORTEST = 128  # documents up to this length are one bucket; then doublings


class Chosen(NamedTuple):
    """First choices for token t + 1 `[B, T]`, and the MTP block's for t + 2, if it runs."""

    next_BT: np.ndarray
    draft_BT: np.ndarray | None


class Case(NamedTuple):
    """A chat, tokenised."""

    skill: str
    thinking: bool
    document: Document


def chooser(program: Program) -> Callable[[Any, Batch], Chosen]:
    """A jitted function: parameters and a batch to the model's first choices."""

    @jax.jit
    def run(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        hidden, head = forward(program, params, batch), params["top"]["head"]
        first = model.output_head(hidden.y_BTD, head).argmax(-1)
        if not hidden.drafts:
            return first, None
        return first, model.output_head(hidden.drafts[0], head).argmax(-1)

    return lambda params, batch: Chosen(*jax.tree.map(np.asarray, run(params, batch)))


def cases(items: Iterable[tuple[str, Any]], tokenizer: Tokenizer) -> Iterator[Case]:
    """Chats with their skill, of (where, item) pairs.

    Raises:
        ValueError: an item is no chat of a skill.
    """
    for where, item in items:
        if not isinstance(item, dict) or not {"skill", "messages"} <= set(item):
            raise ValueError(
                f"{where}: needs 'skill' and 'messages', as make_skills.py writes them"
            )
        yield Case(item["skill"], bool(item.get("thinking")), tokenise(item, tokenizer, where))


def bucket(length: int) -> int:
    """The doubling of `SHORTEST` that a document fits into."""
    size = SHORTEST
    while size < length:
        size *= 2
    return size


class Tally:
    """Counts by (skill, mode, bucket): answers, exact ones; and drafts that would be taken."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])
        self.tokens = [0, 0]
        self.drafts = [0, 0]

    def add(self, case: Case, next_T: np.ndarray, draft_T: np.ndarray | None) -> None:
        """next_T, draft_T: first choices for every token of the chat's document."""
        tokens, learn = case.document.tokens, case.document.learn
        right = np.concatenate([[False], next_T[:-1] == tokens[1:]])
        key = (case.skill, "thinking" if case.thinking else "direct", bucket(len(tokens)))
        for start, stop in _runs(learn):
            self.answers[key][0] += 1
            self.answers[key][1] += bool(right[start:stop].all())
        self.tokens[0] += int(learn.sum())
        self.tokens[1] += int(right[learn].sum())
        if draft_T is not None:
            at = np.flatnonzero(learn[2:])  # the draft made at t is for t + 2
            self.drafts[0] += len(at)
            self.drafts[1] += int((draft_T[at] == next_T[at + 1]).sum())

    def report(self) -> dict[str, Any]:
        """Shares: per row of the table, and over all."""
        rows = [
            {"skill": s, "mode": m, "length": b, "answers": n, "exact": exact / n}
            for (s, m, b), (n, exact) in sorted(self.answers.items())
        ]
        found: dict[str, Any] = {"rows": rows, "tokens": _share(self.tokens)}
        if self.drafts[0]:
            found["first draft accepted"] = _share(self.drafts)
        return found


def score(
    choose: Callable[[Any, Batch], Chosen],
    params: Any,
    chats: Iterable[Case],
    tokens_per_batch: int = 4096,
) -> dict[str, Any]:
    """`Tally.report` over all chats, each by itself in a row of its bucket's length."""
    tally, waiting = Tally(), defaultdict(list)

    def flush(length: int) -> None:
        group = waiting.pop(length)
        rows = max(tokens_per_batch // length, 1)
        batch = _batch([c.document.tokens for c in group], rows, length)
        chosen = choose(params, batch)
        for row, case in enumerate(group):
            size = len(case.document.tokens)
            draft = None if chosen.draft_BT is None else chosen.draft_BT[row, :size]
            tally.add(case, chosen.next_BT[row, :size], draft)

    for case in chats:
        length = bucket(len(case.document.tokens))
        waiting[length].append(case)
        if len(waiting[length]) == max(tokens_per_batch // length, 1):
            flush(length)
    for length in sorted(waiting):
        flush(length)
    return tally.report()


def table(found: dict[str, Any]) -> str:
    """A report as lines of text."""
    lines = [f"{'skill':<20} {'mode':<9} {'length':>6} {'answers':>8} {'exact':>7}"]
    for r in found["rows"]:
        name = f"{r['skill']:<20} {r['mode']:<9} {r['length']:>6}"
        formed = f"  well formed {r['well formed']:.1%}" if "well formed" in r else ""
        lines.append(f"{name} {r['answers']:>8} {r['exact']:>7.1%}{formed}")
    others = [f"{name}: {value:.1%}" for name, value in found.items() if name != "rows"]
    return "\n".join([*lines, *others])


def _share(counts: list[int]) -> float:
    return counts[1] / max(counts[0], 1)


def _runs(learn: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of learnt tokens: one for every answer."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learn.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _batch(documents: list[np.ndarray], rows: int, length: int) -> Batch:
    """One document a row, padded; learnt everywhere (losses are not computed)."""
    out = np.zeros((4, rows, length), np.int32)
    for row, tokens in enumerate(documents):
        out[0, row, : len(tokens)] = tokens
        out[1, row, : len(tokens)] = 1
        out[2, row, : len(tokens)] = np.arange(len(tokens))
    return jax.tree.map(jnp.asarray, from_fields(out))
