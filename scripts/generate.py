"""Runs a converted checkpoint on text, a chat, or token ids.

python scripts/generate.py --checkpoint DIR --prompt "What is 2+2?"
python scripts/generate.py --checkpoint DIR --chat messages.json --thinking high
python scripts/generate.py --checkpoint DIR --tokens ids.json --logits-out logits.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_jax.generator import Generator
    from dsv4_jax.tokenizer import Tokenizer


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="generate.py", description="Runs a converted checkpoint on text or token ids."
    )
    ap.add_argument("--checkpoint", required=True, metavar="DIR", help="made by convert_hf.py")
    given = ap.add_argument_group("input (one of)").add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="one user message (see --raw)")
    given.add_argument("--chat", metavar="FILE.json", help="a list of OpenAI chat messages")
    given.add_argument("--tokens", metavar="FILE.json", help="a list of token-id lists")
    text = ap.add_argument_group("generation")
    text.add_argument("--raw", action="store_true", help="continue --prompt without a chat turn")
    text.add_argument("--max-tokens", type=int, default=256, metavar="N")
    text.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy")
    text.add_argument("--top-p", type=float, default=1.0, metavar="P")
    text.add_argument("--seed", type=int, default=None, metavar="S")
    text.add_argument(
        "--thinking", choices=["chat", "high", "max"], default="chat", help="reasoning mode"
    )
    check = ap.add_argument_group("checks (with --tokens)")
    check.add_argument("--logits-out", metavar="FILE.npz", help="write logits_0, logits_1, …")
    check.add_argument("--mtp-logits-out", metavar="FILE.npz", help="the same of the MTP head")
    check.add_argument("--greedy-out", metavar="FILE.json", help="write --max-tokens greedy ids")
    check.add_argument(
        "--logits-mode", default="prefill", metavar="MODE", help="prefill, decode or chunk:N"
    )
    how = ap.add_argument_group("arithmetic")
    how.add_argument("--numerics", choices=["reference", "plain"], default="reference")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    kernels = "of the hot path; default: pallas on TPU, reference elsewhere; interpret is slow"
    choices = ["reference", "pallas", "interpret"]
    how.add_argument("--implementation", choices=choices, help=kernels)
    return ap


def read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_tokens(path: str) -> list[list[int]]:
    rows = read_json(path)
    plain = isinstance(rows, list) and all(
        isinstance(row, list) and all(type(t) is int for t in row) for row in rows
    )
    if not plain or not rows or not all(rows):
        raise ValueError(f"{path} must hold a list of non-empty lists of token ids")
    return rows


def load(args: argparse.Namespace, longest: int) -> Generator:
    """The model with room for `longest` tokens (a whole number of 128, to share compilations)."""
    from checkpoints.load import load_checkpoint
    from dsv4_jax.generator import Generator
    from dsv4_jax.numerics import Numerics

    cfg, params = load_checkpoint(args.checkpoint)
    if longest > cfg.max_len:
        raise ValueError(f"{longest} tokens exceed the model's context of {cfg.max_len}")
    room = min(-(-longest // 128) * 128, cfg.max_len)
    num = Numerics(args.numerics, args.dtype, args.implementation)
    return Generator(cfg, num, params, room)


def check_tokens(args: argparse.Namespace) -> None:
    """Writes logits and greedy ids of given token lists."""
    import numpy as np

    from dsv4_jax.generator import parse_mode

    parse_mode(args.logits_mode)
    rows = read_tokens(args.tokens)
    generate = args.greedy_out or not (args.logits_out or args.mtp_logits_out)
    new = args.max_tokens if generate else 0
    generator = load(args, max(map(len, rows)) + new)
    files = ((args.logits_out, generator.logits), (args.mtp_logits_out, generator.mtp_logits))
    for path, compute in files:
        if path:
            found: dict[str, Any] = {
                f"logits_{i}": compute(row, args.logits_mode) for i, row in enumerate(rows)
            }
            with open(path, "wb") as file:  # a name would gain a suffix
                np.savez(file, **found)
    if args.greedy_out:
        greedy = [generator.greedy(row, args.max_tokens) for row in rows]
        Path(args.greedy_out).write_text(json.dumps(greedy))
    elif generate:
        sampling, stop = sampling_of(args), frozenset([generator.cfg.eos_id])
        for row in rows:
            print(json.dumps(list(generator.stream(row, sampling, stop))), flush=True)


def sampling_of(args: argparse.Namespace):
    from dsv4_jax.sampling import SamplingParams

    return SamplingParams(args.max_tokens, args.temperature, args.top_p, seed=args.seed)


def prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """Token ids of --prompt or --chat."""
    from dsv4_jax import encoding

    if args.raw:
        return tokenizer.encode_segments(encoding.render_raw(args.prompt))
    body = read_json(args.chat) if args.chat else [{"role": "user", "content": args.prompt}]
    if isinstance(body, dict):
        messages, tools = body.get("messages"), body.get("tools")
    else:
        messages, tools = body, None
    if not isinstance(messages, list):
        raise ValueError(f"{args.chat} must hold a list of messages (or an object with 'messages')")
    profile = encoding.detect_profile_in(args.checkpoint)
    thinking = args.thinking != "chat"
    segments = encoding.render_segments(
        encoding.normalize_messages(messages, tools=tools),
        "thinking" if thinking else "chat",
        reasoning_effort=encoding.resolve_effort(args.thinking, profile) if thinking else None,
        profile=profile,
    )
    return tokenizer.encode_segments(segments)


def speak(args: argparse.Namespace) -> None:
    """Streams the answer to stdout; reasoning is printed as the model writes it."""
    from checkpoints.store import load_config
    from dsv4_jax.tokenizer import Tokenizer

    load_config(args.checkpoint)  # a wrong directory is a clearer complaint than a lacking file
    tokenizer = Tokenizer.from_dir(args.checkpoint)
    ids = prompt_ids(args, tokenizer)
    generator = load(args, len(ids) + args.max_tokens)
    decoder = tokenizer.incremental_decoder()
    for token in generator.stream(ids, sampling_of(args), frozenset([tokenizer.eos_id])):
        if token != tokenizer.eos_id:
            print(decoder.push(token), end="", flush=True)
    print(decoder.flush())


def main(argv: list[str] | None = None) -> int:
    ap = parser()
    args = ap.parse_args(argv)
    if args.raw and args.prompt is None:
        ap.error("--raw goes with --prompt")
    outputs = (args.logits_out, args.mtp_logits_out, args.greedy_out)
    if any(outputs) and args.tokens is None:
        ap.error("--logits-out, --mtp-logits-out and --greedy-out go with --tokens")
    try:
        sampling_of(args)
        (check_tokens if args.tokens else speak)(args)
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
