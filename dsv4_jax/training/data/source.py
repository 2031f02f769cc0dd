"""Batches as a pure function of row numbers: shuffled, mixed and repeated by grain."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np

from dsv4_jax.training.data.packing import decode_row
from dsv4_jax.training.data.prepare import MANIFEST, folder_of


class Source(NamedTuple):
    """Packed rows at `path` and their share of the mixture."""

    path: str
    weight: float = 1.0


class Rows:
    """An endless sequence of rows of one length. Row i is the same in every run with this seed.

    kind: "documents", or "rollouts".

    Raises:
        ValueError: a source was not prepared for this length, or for another vocabulary, or
            sources are of several kinds.
    """

    def __init__(
        self, sources: tuple[Source, ...], length: int, seed: int, vocab_size: int
    ) -> None:
        if not sources:
            raise ValueError("a dataset needs at least one source")
        self.length, self.kind = length, ""
        parts = [self._open(source, seed + i, vocab_size) for i, source in enumerate(sources)]
        weights = [source.weight for source in sources]
        self._rows: Any = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)

    def _open(self, source: Source, seed: int, vocab_size: int) -> Any:
        folder = folder_of(source.path, self.length)
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no packed rows: run scripts/prepare_data.py with --lengths "
                f"{self.length}"
            )
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["vocab_size"] > vocab_size:
            raise ValueError(
                f"{folder} has token ids up to {manifest['vocab_size'] - 1} but the model's "
                f"vocab_size is {vocab_size}"
            )
        kind = manifest.get("kind", "documents")
        if self.kind and kind != self.kind:
            raise ValueError(f"{folder} holds {kind}, and other sources of its data {self.kind}")
        self.kind = kind
        files = [str(folder / name) for name in manifest["shards"]]
        records: Any = grain.sources.ArrayRecordDataSource(files)
        data = grain.MapDataset.source(records)
        return data.seed(seed).shuffle().repeat()

    def batch(self, first: int, which: Iterable[int]) -> np.ndarray:
        """Rows `first + i` for every i of `which`, int32 `[4 or 7, rows, length]`: see
        `batch.from_fields`.

        A host asks for the rows of a batch that its devices work on.
        """
        rows = [decode_row(self._rows[first + int(i)], self.length) for i in which]
        return np.stack(rows, axis=1)


class Prefetch:
    """Reads the batch that will be asked for next while the current one is being used."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[Any, Future[np.ndarray]] | None = None

    def get(self, rows: Rows, first: int, count: int, which: Sequence[int]) -> np.ndarray:
        """`rows.batch(first, which)`; starts reading the same of the batch `count` rows on."""
        key = (id(rows), first, tuple(which))
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == key:
            found = waiting[1].result()
        else:
            found = rows.batch(first, which)
        future = self._pool.submit(rows.batch, first + count, which)
        self._next = ((id(rows), first + count, tuple(which)), future)
        return found

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
