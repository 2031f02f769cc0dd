"""Batches as a pure function of row numbers: shuffled, mixed and repeated by grain."""

from __future__ import annotations

import json
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

    Raises:
        ValueError: a source was not prepared for this length, or for another vocabulary.
    """

    def __init__(
        self, sources: tuple[Source, ...], length: int, seed: int, vocab_size: int
    ) -> None:
        if not sources:
            raise ValueError("a dataset needs at least one source")
        self.length = length
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
        files = [str(folder / name) for name in manifest["shards"]]
        records: Any = grain.sources.ArrayRecordDataSource(files)
        data = grain.MapDataset.source(records)
        return data.seed(seed).shuffle().repeat()

    def batch(self, first: int, count: int, host: int = 0, hosts: int = 1) -> np.ndarray:
        """Rows `first` … `first + count`, of which this host reads every `hosts`-th block.

        int32 `[4, count / hosts, length]`, the fields of `Batch`.

        Raises:
            ValueError: `count` does not divide among hosts.
        """
        if count % hosts:
            raise ValueError(f"a batch of {count} rows does not divide among {hosts} hosts")
        share = count // hosts
        begin = first + host * share
        rows = [decode_row(self._rows[i], self.length) for i in range(begin, begin + share)]
        return np.stack(rows, axis=1)


class Prefetch:
    """Reads the batch that will be asked for next while the current one is being used."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[Any, Future[np.ndarray]] | None = None

    def get(self, rows: Rows, first: int, count: int, host: int, hosts: int) -> np.ndarray:
        """`rows.batch(…)`; starts reading the batch behind it."""
        key = (id(rows), first, count, host, hosts)
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == key:
            found = waiting[1].result()
        else:
            found = rows.batch(first, count, host, hosts)
        following = (id(rows), first + count, count, host, hosts)
        future = self._pool.submit(rows.batch, first + count, count, host, hosts)
        self._next = (following, future)
        return found

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
