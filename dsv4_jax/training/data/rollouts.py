"""Rollouts: what a model drew for a prompt, how likely, and what it was worth; as packed rows.

A line of JSON each: `{"prompt": ids, "completion": ids, "logprobs": floats, "reward": r, "group":
g}`. Instead of `prompt` there may be `messages` (with `tools`, `thinking`), which the encoder
renders. `sample` names the answer a line is a turn of, where answers have several; `teacher`
(a number) the one teacher it is for. Only the completion is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_jax.tokenizer import Tokenizer
from dsv4_jax.training.data.documents import Document, Note, find_files, read_items, render
from dsv4_jax.training.data.prepare import write_rows
from dsv4_jax.training.grpo import group_advantages

KIND = "rollouts"
Key = tuple[str, str]  # of a group, and of an answer in it


def prepare_rollouts(
    sources: Sequence[str | Path],
    target: str | Path,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    by_deviation: bool = False,
    progress: Callable[[str], None] = print,
) -> dict[int, dict[str, int]]:
    """Writes rows of every length under `target`, as `prepare.prepare` does of documents.

    Advantages are of whole groups; by_deviation: see `group_advantages`. A rollout that does not
    fit into a row is left out, and counted as `too_long`: cutting it would change what it means.

    Raises:
        ValueError: a line is not a rollout, an answer's turns have several rewards, nothing is left
            to learn, or a folder exists already.
    """
    files = find_files(sources)
    advantages = advantages_of(_lines(files), by_deviation)
    dropped: dict[int, int] = {}

    def documents(length: int) -> Iterator[Document]:
        dropped[length] = 0
        for where, item in _lines(files):
            document = tokenise(item, tokenizer, advantages[key_of(item, where)], where)
            if len(document.tokens) > length:
                dropped[length] += 1
            else:
                yield document
        progress(f"length {length}: {dropped[length]} rollouts too long")

    found = write_rows(documents, target, tokenizer, lengths, KIND)
    return {length: totals | {"too_long": dropped[length]} for length, totals in found.items()}


def advantages_of(lines: Iterator[tuple[str, Any]], by_deviation: bool) -> dict[Key, float]:
    """Of every answer, by group and name: its reward beside those of its group.

    Raises:
        ValueError: turns of one answer have several rewards.
    """
    rewards: dict[str, dict[str, float]] = {}
    for where, item in lines:
        group, sample = key_of(item, where)
        reward = _number(item, "reward", where)
        if rewards.setdefault(group, {}).setdefault(sample, reward) != reward:
            raise ValueError(f"{where}: answer {sample} of group {group} has several rewards")
    found = {}
    for group, samples in rewards.items():
        values = group_advantages(list(samples.values()), by_deviation)
        found |= {(group, sample): float(v) for sample, v in zip(samples, values, strict=True)}
    return found


def key_of(item: Any, where: str) -> Key:
    """Group and answer of a line; a line without `sample` is an answer of its own."""
    if not isinstance(item, dict) or "group" not in item:
        raise ValueError(f"{where}: a rollout needs a 'group'")
    return str(item["group"]), str(item.get("sample", where))


def tokenise(item: dict[str, Any], tokenizer: Tokenizer, advantage: float, where: str) -> Document:
    """A rollout as a document of which the completion is learnt.

    Raises:
        ValueError: a field is missing or does not fit, or an id lies outside the vocabulary.
    """
    if ("prompt" in item) == ("messages" in item):
        raise ValueError(f"{where}: needs either a 'prompt' of token ids or 'messages'")
    if "prompt" in item:
        prompt = _ids(item, "prompt", tokenizer, where)
    else:
        try:
            prompt = tokenizer.encode_segments(render(item))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    drawn = _ids(item, "completion", tokenizer, where)
    log_probs = item.get("logprobs")
    if not isinstance(log_probs, list) or len(log_probs) != len(drawn):
        raise ValueError(f"{where}: needs 'logprobs', one for each of {len(drawn)} drawn tokens")
    noted = np.concatenate([np.zeros(len(prompt)), np.asarray(log_probs, np.float64)])
    if not np.isfinite(noted).all() or noted.max() > 0:
        raise ValueError(f"{where}: 'logprobs' must be finite and at most 0")
    teacher = item.get("teacher", -1)
    if type(teacher) is not int or teacher < -1:
        raise ValueError(f"{where}: teacher={teacher!r} must be the number of one, from 0")
    tokens = np.array([*prompt, *drawn], np.int32)
    learn = np.arange(len(tokens)) >= len(prompt)
    return Document(tokens, learn, Note(noted.astype(np.float32), advantage, teacher))


def _lines(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        yield from read_items(path)


def _ids(item: dict[str, Any], name: str, tokenizer: Tokenizer, where: str) -> list[int]:
    ids = item.get(name)
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"{where}: needs '{name}', a list of token ids")
    wrong = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"{where}: token id {wrong} in '{name}' is not in the vocabulary")
    return ids


def _number(item: dict[str, Any], name: str, where: str) -> float:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{where}: {name}={value!r} must be a finite number")
    return float(value)
