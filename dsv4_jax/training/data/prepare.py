"""Tokenises and packs files into ArrayRecord shards, one folder per row length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordWriter,
)

from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import Document, find_files, read_items, tokenise
from dsv4_jax.training.data.packing import encode_row, pack

MANIFEST = "manifest.json"
ROWS_PER_SHARD = 1 << 14


def folder_of(root: str | Path, length: int) -> Path:
    """Where rows of this length lie."""
    return Path(root) / f"length_{length}"


def prepare(
    sources: Sequence[str | Path],
    target: str | Path,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    progress: Callable[[str], None] = print,
) -> dict[int, dict[str, int]]:
    """Writes rows of every length under `target`; returns what each folder holds.

    A folder counts once its manifest is written, last of all; one that is there already is an
    error.

    Raises:
        ValueError: sources are not readable, hold nothing to learn, or a folder exists already.
    """
    files = find_files(sources)

    def documents(length: int) -> Iterator[Document]:
        tokens = 0
        for number, path in enumerate(files, start=1):
            for where, item in read_items(path):
                yield (document := tokenise(item, tokenizer, where))
                tokens += len(document.tokens)
            progress(f"length {length}: {number}/{len(files)} files, {tokens} tokens")

    return write_rows(documents, target, tokenizer, lengths, "documents")


def write_rows(
    documents: Callable[[int], Iterator[Document]],
    target: str | Path,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    kind: str,
) -> dict[int, dict[str, int]]:
    """Packs documents, made anew for every length, into a folder for each; see `prepare`.

    kind: of documents, for the manifest.
    """
    found = {}
    for length in lengths:
        folder = folder_of(target, length)
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds packed rows already: remove it or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.array_record"):
            old.unlink()
        found[length] = _write(documents(length), folder, tokenizer, length, kind)
    return found


def _write(
    documents: Iterator[Document], folder: Path, tokenizer: Tokenizer, length: int, kind: str
) -> dict[str, int]:
    totals = {"documents": 0, "tokens": 0, "learnt": 0, "rows": 0}

    def counted() -> Iterator[Document]:
        for document in documents:
            totals["documents"] += 1
            totals["tokens"] += len(document.tokens)
            totals["learnt"] += int(document.learn.sum())
            yield document

    shards: list[str] = []
    writer = None
    for row in pack(counted(), length):
        if totals["rows"] % ROWS_PER_SHARD == 0:
            if writer is not None:
                writer.close()
            shards.append(f"rows_{len(shards):05d}.array_record")
            writer = ArrayRecordWriter(str(folder / shards[-1]), "group_size:1")
        assert writer is not None
        writer.write(encode_row(row))
        totals["rows"] += 1
    if writer is None:
        raise ValueError(f"{folder}: there is nothing to learn in what was given")
    writer.close()
    manifest = {
        "kind": kind,
        "length": length,
        "shards": shards,
        "tokenizer": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **totals,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return totals
