"""Writes chats that teach and test skills, and the tokenizer for them.

    python scripts/make_skills.py tokenizer --out runs/skills/tokenizer --texts TEXTS --size 4096
    python scripts/make_skills.py chats --out chats.jsonl --tokenizer DIR --count 20000 --tokens 256

Chats are JSON lines for prepare_data.py. The split `held-out` shares no instance with `train`.
"""

from __future__ import annotations

import argparse
import sys


def mixture(text: str) -> dict[str, float]:
    """`skill=share,…`."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: float(share) for name, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must look like copy=1,sort=0.5") from None


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="make_skills.py", description="Chats that teach and test skills, and their tokenizer."
    )
    commands = ap.add_subparsers(dest="command", required=True)
    chats = commands.add_parser("chats", help="JSON lines for prepare_data.py")
    chats.add_argument("--out", required=True, metavar="FILE.jsonl")
    chats.add_argument("--tokenizer", required=True, metavar="DIR", help="measures lengths")
    chats.add_argument("--count", type=int, required=True, metavar="N", help="conversations")
    chats.add_argument("--tokens", type=int, default=256, help="longest one; default: 256")
    chats.add_argument(
        "--level", type=int, default=0, help="0 to 3: how long lists and numbers are"
    )
    chats.add_argument("--split", default="train", help="train or held-out; default: train")
    chats.add_argument("--seed", type=int, default=0)
    chats.add_argument("--mix", type=mixture, metavar="SKILL=SHARE,…", help="default: all alike")
    chats.add_argument("--thinking", type=float, default=0.4, help="share; default: 0.4")
    chats.add_argument("--texts", metavar="DIR", help="natural text between facts")
    words = commands.add_parser("tokenizer", help="tokenizer.json")
    words.add_argument("--out", required=True, metavar="DIR")
    words.add_argument("--texts", metavar="DIR", help="natural text to learn words from")
    words.add_argument("--size", type=int, default=4096, help="ids; default: 4096")
    words.add_argument("--seed", type=int, default=0)
    return ap


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from dsv4_jax.training.skills.write import write_chats, write_tokenizer

    def progress(line: str) -> None:
        print(line, file=sys.stderr)

    options = {k: v for k, v in vars(args).items() if k != "command"}
    try:
        write = write_chats if args.command == "chats" else write_tokenizer
        print(write(**options, progress=progress))
    except (ValueError, OSError) as error:
        print(f"make_skills.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
