"""Held-out loss on packed rows, or exact answers to chats of skills.

python scripts/evaluate.py runs/tiny --data runs/held-out --length 512 --tokenizer DIR
python scripts/evaluate.py CHECKPOINT --data runs/held-out --length 512 --numerics reference
python scripts/evaluate.py runs/demo --suite skills --chats held-out.jsonl --tokenizer DIR
python scripts/evaluate.py http://127.0.0.1:8000 --suite skills --chats held-out.jsonl \\
    --tokenizer DIR

A run or checkpoint is scored by one forward pass per chat, reasoning included. A server is asked
every question at temperature 0 and has its tools played; only answers count.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

MAX_TOKENS, PROGRESS = 512, 50


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Held-out loss on packed rows, or exact answers to chats of skills.",
    )
    ap.add_argument(
        "model", metavar="DIR|URL", help="a run, a converted checkpoint, or (skills) a server"
    )
    ap.add_argument("--suite", choices=["loss", "skills"], default="loss")
    ap.add_argument("--tokenizer", metavar="DIR", help="default: beside the model")
    ap.add_argument("--dense", action="store_true", help="attend to all compressed rows")
    ap.add_argument("--json", action="store_true")
    loss = ap.add_argument_group("loss")
    loss.add_argument("--data", metavar="DIR", help="made by prepare_data.py")
    loss.add_argument("--length", type=int, metavar="N", help="tokens per row")
    loss.add_argument("--rows", type=int, default=64, metavar="N", help="default: 64")
    loss.add_argument("--batch", type=int, default=8, metavar="N", help="rows at a time")
    loss.add_argument(
        "--numerics",
        choices=["plain", "reference"],
        default="plain",
        help="reference: as served, with its rounding, document by document (checkpoints only)",
    )
    skills = ap.add_argument_group("skills")
    skills.add_argument("--chats", metavar="FILE", help="made by make_skills.py, held out")
    skills.add_argument("--limit", type=int, metavar="N", help="only the first chats")
    skills.add_argument(
        "--random-index",
        action="store_true",
        help="CSA layers read as many rows as ever, chosen without regard to content",
    )
    return ap


def load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Configuration, parameters, and how to score a batch."""
    from checkpoints.load import load_checkpoint
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.training.evaluate import scorer, served_scorer
    from dsv4_jax.training.restore import MODEL_FILE

    if args.numerics == "reference":
        if (Path(args.model) / MODEL_FILE).is_file():
            raise ValueError("--numerics reference is for checkpoints: export and convert the run")
        cfg, params = load_checkpoint(args.model, scan=False)
        return cfg, params, served_scorer(cfg, Numerics("reference", "bfloat16"), args.length)
    program, params = load_plain(args)
    return program.cfg, params, scorer(program)


def load_plain(args: argparse.Namespace) -> tuple[Any, Any]:
    """The program and float32 parameters of a run or a converted checkpoint."""
    from checkpoints.load import load_checkpoint
    from dsv4_jax.training.program import Program
    from dsv4_jax.training.restore import plain_model

    cfg, params = plain_model(args.model, load_checkpoint)
    program = Program(
        cfg,
        sparse=not args.dense,
        index_loss=False,
        mtp=cfg.num_mtp_layers > 0,
        random_index=args.random_index,
    )
    return program, params


def run_loss(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.data.source import Rows, Source
    from dsv4_jax.training.evaluate import batches, evaluate

    if not args.data or not args.length:
        raise ValueError("--suite loss needs --data and --length")
    cfg, params, score = load(args)
    rows = Rows((Source(args.data),), args.length, 0, cfg.vocab_size)
    folder = Path(args.tokenizer or args.model)
    bytes_of = None
    if args.tokenizer or (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_dir(folder)
        sizes = [len(tokenizer.token_bytes(i)) for i in range(cfg.vocab_size)]
        bytes_of = np.array([0 if i in tokenizer.control_ids else n for i, n in enumerate(sizes)])
    return evaluate(score, params, batches(rows, args.rows, args.batch), bytes_of)


def run_skills(args: argparse.Namespace) -> dict[str, Any]:
    """Exact answers by skill, mode and length."""
    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.data.documents import read_items
    from dsv4_jax.training.skills.score import cases, chooser, score

    if not args.chats:
        raise ValueError("--suite skills needs --chats")
    is_server = args.model.startswith(("http://", "https://"))
    if is_server and (args.dense or args.random_index or not args.tokenizer):
        raise ValueError("a server is asked as it is: no --dense, no --random-index, a --tokenizer")
    tokenizer = Tokenizer.from_dir(args.tokenizer or args.model)
    items = islice(read_items(Path(args.chats)), args.limit)
    if is_server:
        return ask_server(args.model, items, tokenizer)
    program, params = load_plain(args)
    return score(chooser(program), params, cases(items, tokenizer))


def ask_server(url: str, items: Any, tokenizer: Any) -> dict[str, Any]:
    from dsv4_jax.serving.client import Answer, Client
    from dsv4_jax.training.data.documents import tokenise
    from dsv4_jax.training.skills.replay import replay
    from dsv4_jax.training.skills.score import bucket

    client = Client(url)

    def ask(messages: list[Any], tools: list[Any], thinking: bool) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        body["thinking"] = {"type": "enabled" if thinking else "disabled"}
        if tools:
            body["tools"] = tools
        answer = Answer()
        for _ in client.chat(answer, body):
            pass
        return answer.message()

    def chats() -> Iterator[tuple[Any, int]]:
        for where, item in items:
            yield item, bucket(len(tokenise(item, tokenizer, where).tokens))

    def progress(done: int) -> None:
        if done % PROGRESS == 0:
            print(f"{done} answers", file=sys.stderr)

    return replay(ask, chats(), progress)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from dsv4_jax.serving.client import ServerError

    try:
        found = run_loss(args) if args.suite == "loss" else run_skills(args)
    except (ValueError, OSError, ServerError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found))
    else:
        show(found, args.suite)
    return 0


def show(found: dict[str, Any], suite: str) -> None:
    if suite == "skills":
        from dsv4_jax.training.skills.score import table

        print(table(found))
        return
    for name, value in found.items():
        print(f"{name:>24}  {value:.4f}" if isinstance(value, float) else f"{name:>24}  {value}")


if __name__ == "__main__":
    sys.exit(main())
