"""Best-fit packing: documents into rows of one length, cutting only what is longer than a row."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import numpy as np

from dsv4_jax.training.data.documents import Document

Row = list[Document]


def cut(document: Document, length: int) -> Iterator[Document]:
    """Pieces of at most `length` tokens; each is a document of its own from then on."""
    for start in range(0, len(document.tokens), length):
        part = slice(start, start + length)
        yield Document(document.tokens[part], document.learn[part])


def pack(documents: Iterable[Document], length: int, window: int = 4096) -> Iterator[Row]:
    """Rows of up to `length` tokens, longest pieces of every `window` documents placed first.

    A piece goes into the open row that it fills best. Pieces with nothing to learn are dropped.

    Raises:
        ValueError: `length` is not positive.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a row holds a token and its target")
    waiting: list[Document] = []
    for number, document in enumerate(documents, start=1):
        fits = len(document.tokens) <= length
        pieces = [document] if fits else cut(document, length)
        waiting += [p for p in pieces if len(p.tokens) > 1 and p.learn[1:].any()]
        if number % window == 0:
            yield from _best_fit(waiting, length)
            waiting = []
    yield from _best_fit(waiting, length)


def _best_fit(pieces: list[Document], length: int) -> Iterator[Row]:
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i].tokens), i))
    rows: list[Row] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in order:
        size = len(pieces[i].tokens)
        at = bisect.bisect_left(room, (size, 0))
        if at == len(room):
            rows.append([])
            left, row = length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(pieces[i])
        if left > size:
            bisect.insort(room, (left - size, row))
    # rows by their first piece's place in the input: long and short ones stay mixed
    first = {id(p): i for i, p in enumerate(pieces)}
    rows.sort(key=lambda row: min(first[id(p)] for p in row))
    yield from rows


def encode_row(row: Row) -> bytes:
    """A row as bytes: number of documents, their lengths, tokens (int32), mask (bits); of rollouts
    also their advantages (float32), teachers (int32) and log-probabilities (float32)."""
    lengths = np.array([len(d.tokens) for d in row], np.int32)
    tokens = np.concatenate([d.tokens for d in row]).astype(np.int32)
    learn = np.packbits(np.concatenate([d.learn for d in row]))
    parts = [np.int32(len(row)), lengths, tokens, learn]
    notes = [d.note for d in row if d.note is not None]
    if notes:
        assert len(notes) == len(row)
        parts.append(np.array([n.advantage for n in notes], np.float32))
        parts.append(np.array([n.teacher for n in notes], np.int32))
        parts.append(np.concatenate([n.log_probs for n in notes]).astype(np.float32))
    return b"".join(part.tobytes() for part in parts)


def decode_row(raw: bytes, length: int) -> np.ndarray:
    """The inverse, padded: int32 `[4, length]` as the fields of `Batch`, or `[7, length]` with
    those of `Rollout` (floats as their bits)."""
    count = int(np.frombuffer(raw, np.int32, 1)[0])
    lengths = np.frombuffer(raw, np.int32, count, 4)
    total, start = int(lengths.sum()), 4 + 4 * count
    behind = start + 4 * total + -(-total // 8)
    out = np.zeros((7 if len(raw) > behind else 4, length), np.int32)
    out[0, :total] = np.frombuffer(raw, np.int32, total, start)
    out[1, :total] = np.repeat(np.arange(1, count + 1), lengths)
    out[2, :total] = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    bits = np.frombuffer(raw, np.uint8, -(-total // 8), start + 4 * total)
    out[3, :total] = np.unpackbits(bits, count=total)
    if len(out) == 7:
        notes = np.frombuffer(raw[behind:], np.int32)
        advantage, teacher, log_probs = np.split(notes, (count, 2 * count))
        out[4, :total] = log_probs
        out[5, :total] = np.repeat(advantage, lengths)
        out[6, :total] = np.repeat(teacher, lengths)
    return out
