"""Documents from files: plain text, JSON lines, chats and ArrayRecord; tokenised, with a mask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import (  # pyright: ignore[reportMissingImports]
    ArrayRecordReader,
)

from dsv4_jax.encoding import constants as C
from dsv4_jax.encoding import render_fim, render_segments
from dsv4_jax.encoding.segments import Segment
from dsv4_jax.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".array_record")


class Note(NamedTuple):
    """What is known of a document that a model drew. log_probs: float32, as the sampler gave them
    to every token (0 where it was not drawn). teacher: which one it is for; -1: all."""

    log_probs: np.ndarray
    advantage: float
    teacher: int = -1


class Document(NamedTuple):
    """Token ids, int32, and which of them are learnt, bool; a note on rollouts."""

    tokens: np.ndarray
    learn: np.ndarray
    note: Note | None = None


def find_files(sources: Iterable[str | Path]) -> list[Path]:
    """Files of the known kinds among files and (recursively) folders, in order of their names.

    Raises:
        ValueError: a source does not exist, or nothing was found.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source} does not exist")
        inside = sorted(source.rglob("*")) if source.is_dir() else [source]
        found += [path for path in inside if path.is_file() and path.suffix in SUFFIXES]
        if source.is_file() and source.suffix not in SUFFIXES:
            raise ValueError(f"{source}: its suffix must be one of {', '.join(SUFFIXES)}")
    if not found:
        raise ValueError(f"no {', '.join(SUFFIXES)} files in {', '.join(map(str, sources))}")
    return found


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (where, item): a text file is one text; other files hold one text or object each.

    Raises:
        ValueError: a line or record is not valid; names it.
    """
    if path.suffix == ".txt":
        yield str(path), path.read_text(encoding="utf-8")
    elif path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield (where := f"{path}:{number}"), _parse(line, where)
    else:
        reader = ArrayRecordReader(str(path))
        for number in range(reader.num_records()):
            raw = reader.read([number])[0].decode("utf-8")
            where = f"{path}, record {number}"
            yield where, _parse(raw, where) if raw[:1] in "{[" else raw
        reader.close()


def _parse(raw: str, where: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def tokenise(item: Any, tokenizer: Tokenizer, where: str) -> Document:
    """A text, {"text": …}, one with a hole {"prefix": …, "suffix": …, "middle": …} or a chat
    {"messages": […], "tools": […], "thinking": bool}.

    Texts stand between BOS and EOS and are learnt whole, those with a hole as the server writes
    them, the middle last. Of chats only what the assistant writes is
    learnt, its end included; in thinking mode only answers whose reasoning is rendered.

    Raises:
        ValueError: the item is none of these.
    """
    if isinstance(item, dict) and "messages" in item:
        return _chat(item, tokenizer, where)
    if isinstance(item, dict) and "middle" in item:
        return _with_hole(item, tokenizer, where)
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise ValueError(f"{where}: needs a 'text', 'messages' or 'middle'")
    ids = [tokenizer.bos_id, *tokenizer.encode_text(text), tokenizer.eos_id]
    return Document(np.array(ids, np.int32), np.ones(len(ids), bool))


def _with_hole(item: dict[str, Any], tokenizer: Tokenizer, where: str) -> Document:
    parts = [item.get(name) for name in ("prefix", "suffix", "middle")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: needs the texts 'prefix', 'suffix' and 'middle'")
    prefix, suffix, middle = map(str, parts)
    ids = tokenizer.encode_segments(render_fim(prefix, suffix))
    ids = [*ids, *tokenizer.encode_text(middle), tokenizer.eos_id]
    return Document(np.array(ids, np.int32), np.ones(len(ids), bool))


def _chat(item: dict[str, Any], tokenizer: Tokenizer, where: str) -> Document:
    thinking = item.get("thinking", False)
    if not isinstance(thinking, bool):
        raise ValueError(f"{where}: thinking={thinking!r} must be true or false")
    try:
        segments = render(item)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    ids: list[int] = []
    learn: list[bool] = []
    for segment, learnt in mark_answers(segments, thinking):
        new = tokenizer.encode_segments([segment])
        ids += new
        learn += [learnt] * len(new)
    return Document(np.array(ids, np.int32), np.array(learn, bool))


def render(item: dict[str, Any]) -> list[Segment]:
    """A chat as the encoder writes it; tools are declared by its system message.

    Raises:
        ValueError: the encoder refuses a message.
    """
    messages, tools = list(item["messages"]), item.get("tools")
    if tools:
        if not messages or messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0] = {**messages[0], "tools": tools}
    return render_segments(messages, "thinking" if item.get("thinking") else "chat")


def mark_answers(segments: list[Segment], thinking: bool) -> Iterator[tuple[Segment, bool]]:
    """Yields each segment and whether the assistant writes it.

    The turn marker and the think token behind it belong to the prompt; the end of turn does not.
    """
    opening = speaking = False
    for segment in segments:
        if segment.is_control and segment.text == C.ASSISTANT:
            opening, speaking = True, False
            yield segment, False
        elif opening:
            opening = False
            speaking = segment.text == (C.THINK_START if thinking else C.THINK_END)
            yield segment, False
        else:
            yield segment, speaking
            if segment.is_control and segment.text == C.EOS:
                speaking = False
