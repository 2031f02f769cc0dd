"""Tokenises and packs text and chats for training.

python scripts/prepare_data.py corpus/ chats.jsonl --out runs/data --tokenizer DIR --lengths 512
python scripts/prepare_data.py drawn.jsonl --rollouts --out runs/drawn --tokenizer DIR --lengths 256

Reads .txt (one document each), .jsonl and .array_record (texts, {"text": …},
{"prefix": …, "suffix": …, "middle": …}, or chats
{"messages": […], "tools": […], "thinking": true}). Of chats only the assistant's part is learnt.
With --rollouts: lines of make_rollouts.py, for objective=Grpo(…) or Distill(…).
"""

from __future__ import annotations

import argparse
import json
import sys


def lengths(text: str) -> list[int]:
    """Comma-separated row lengths."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers, separated by commas") from None


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(
        prog="prepare_data.py", description="Tokenises and packs text and chats for training."
    )
    ap.add_argument("sources", nargs="+", metavar="SRC", help="files or folders")
    ap.add_argument("--out", required=True, metavar="DIR", help="a folder per length goes there")
    ap.add_argument("--tokenizer", required=True, metavar="DIR", help="holds tokenizer.json")
    ap.add_argument("--lengths", required=True, type=lengths, metavar="N,N", help="tokens per row")
    ap.add_argument("--rollouts", action="store_true", help="sources are rollouts with rewards")
    ap.add_argument(
        "--by-deviation",
        action="store_true",
        help="with --rollouts: divide advantages by the standard deviation of their group",
    )
    ap.add_argument("--json", action="store_true", help="print totals as JSON")
    args = ap.parse_args(argv)
    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.data.prepare import prepare
    from dsv4_jax.training.data.rollouts import prepare_rollouts

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    try:
        tokenizer = Tokenizer.from_dir(args.tokenizer)
        what = (args.sources, args.out, tokenizer, args.lengths)
        if args.by_deviation and not args.rollouts:
            raise ValueError("--by-deviation is for --rollouts")
        if args.rollouts:
            found = prepare_rollouts(*what, args.by_deviation, progress)
        else:
            found = prepare(*what, progress)
    except (ValueError, OSError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found))
        return 0
    for length, totals in found.items():
        filled = totals["tokens"] / (totals["rows"] * length)
        print(
            f"length {length}: {totals['rows']} rows, {totals['tokens']} tokens, {filled:.1%} full"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
