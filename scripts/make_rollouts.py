"""Draws answers to chats of skills from a run or a checkpoint, with rewards, for GRPO.

    python scripts/make_rollouts.py runs/demo --chats chats.jsonl --tokenizer DIR --out drawn.jsonl
    python scripts/prepare_data.py drawn.jsonl --rollouts --out runs/drawn --tokenizer DIR …

Every question of the chats is a group of --answers answers, judged by rule: 1 if the final text is
the expected one, else 0. Tools are played. Temperature is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="make_rollouts.py", description="Draws answers to chats of skills, with rewards."
    )
    ap.add_argument("model", metavar="DIR", help="a run or a converted checkpoint")
    ap.add_argument("--chats", required=True, metavar="FILE", help="made by make_skills.py")
    ap.add_argument("--out", required=True, metavar="FILE.jsonl")
    ap.add_argument("--tokenizer", metavar="DIR", help="default: beside the model")
    ap.add_argument("--answers", type=int, default=8, metavar="N", help="a question; default: 8")
    ap.add_argument("--limit", type=int, metavar="N", help="only the first chats")
    ap.add_argument("--skip", type=int, default=0, metavar="N", help="leaves out so many before")
    ap.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    ap.add_argument("--max-len", type=int, default=512, metavar="N", help="with the prompt")
    ap.add_argument("--seed", type=int, default=0)
    return ap


def draw(args: argparse.Namespace) -> tuple[int, int, float]:
    """Writes the file; returns groups, answers and their mean reward."""
    from checkpoints.load import load_checkpoint
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.tokenizer import Tokenizer
    from dsv4_jax.training.data.documents import read_items
    from dsv4_jax.training.restore import plain_model
    from dsv4_jax.training.skills.draw import Sampler, rollouts

    if args.answers < 2:
        raise ValueError(f"--answers {args.answers} must be at least 2: a group compares them")
    cfg, params = plain_model(args.model, load_checkpoint)
    tokenizer = Tokenizer.from_dir(args.tokenizer or args.model)
    num = Numerics("plain", "float32")
    sampler = Sampler(cfg, num, params, tokenizer.eos_id, args.max_len, args.max_tokens)
    until = None if args.limit is None else args.skip + args.limit
    chats = (item for _, item in islice(read_items(Path(args.chats)), args.skip, until))
    rewards: dict[tuple[str, str], float] = {}
    out = Path(args.out)
    part = out.with_name(out.name + ".part")  # half a file would look like a whole one
    with part.open("w", encoding="utf-8") as file:
        for line in rollouts(sampler, tokenizer, chats, args.answers, args.seed):
            file.write(json.dumps(line) + "\n")
            key = line["group"], line["sample"]
            if key not in rewards and len(rewards) % (50 * args.answers) == 0:
                print(f"{len(rewards)} answers", file=sys.stderr)
            rewards[key] = line["reward"]
    if not rewards:
        part.unlink()
        raise ValueError(f"{args.chats} has no question that fits into --max-len {args.max_len}")
    part.replace(out)
    groups = len({group for group, _ in rewards})
    return groups, len(rewards), sum(rewards.values()) / len(rewards)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        groups, answers, mean = draw(args)
    except (ValueError, OSError) as error:
        print(f"make_rollouts.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {answers} answers to {groups} questions, mean reward {mean:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
