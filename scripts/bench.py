"""Measurements, each as a ratio to a peer or a floor in the same run.

python scripts/bench.py model
python scripts/bench.py model --peer PYTHON    beside transformers, run by that Python
python scripts/bench.py serve                  load on the demo server; --url: on any server
python scripts/bench.py turns                  second turn of a long chat beside the first
python scripts/bench.py restart                a long prompt again after a restart, from disk
python scripts/bench.py engine                 the engine beside a bare decode loop
python scripts/bench.py speculate --checkpoint DIR    guesses of the MTP block beside none
python scripts/bench.py kernels                compiled for TPUs, bytes and floors; needs libtpu
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFAULT_CONFIG = ROOT / "tests" / "data" / "bench_config.json"
DEMO_CONFIG = ROOT / "dsv4_jax" / "data" / "demo" / "config.json"


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",") if part]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must hold positive numbers")
    return values


def build_parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = ap.add_subparsers(dest="command", required=True)
    text = "tokens per CPU-second and peak memory of the model, on one core, float32"
    model = commands.add_parser("model", help=text, description=text)
    config = "config.json of the model (default: a 71M one with every layer kind)"
    model.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help=config)
    model.add_argument("--lengths", type=numbers, default=[512, 2048, 8192], metavar="N,N")
    model.add_argument("--decode-lengths", type=numbers, default=[512, 8192], metavar="N,N")
    model.add_argument("--batches", type=numbers, default=[1, 8], metavar="B,B", help="of decode")
    peer = "measure transformers too; a Python that has torch and transformers"
    model.add_argument("--peer", metavar="PYTHON", help=peer)
    model.add_argument("--json", action="store_true", help="one JSON object a case")
    for add in (add_serve, add_turns, add_restart, add_engine, add_speculate, add_kernels):
        add(commands).add_argument("--json", action="store_true", help="JSON instead of a table")
    return ap


def add_serve(commands: Any) -> argparse.ArgumentParser:
    text = "first-token and inter-token times and throughput of a server under load"
    serve = commands.add_parser("serve", help=text, description=text)
    serve.add_argument("--url", help="of the server; default: starts the demo")
    serve.add_argument("--api-key", metavar="K")
    serve.add_argument("--requests", type=int, default=64, metavar="N", help="in all; default 64")
    loop = serve.add_mutually_exclusive_group()
    loop.add_argument("--clients", type=int, default=8, metavar="N", help="closed loop; default 8")
    loop.add_argument("--rate", type=float, metavar="R", help="open loop: requests per second")
    serve.add_argument("--prompt-chars", type=int, default=200, metavar="N", help="default 200")
    serve.add_argument("--max-tokens", type=int, default=64, metavar="N", help="default 64")
    serve.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and arrivals")
    return serve


def add_turns(commands: Any) -> argparse.ArgumentParser:
    text = "time to the first token in the second turn of a long chat, beside the first turn"
    turns = commands.add_parser("turns", help=text, description=text)
    turns.add_argument("--url", help="of the server; default: starts the demo")
    turns.add_argument("--api-key", metavar="K")
    turns.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the first prompt")
    turns.add_argument("--repeats", type=int, default=5, metavar="N", help="chats")
    return turns


def add_restart(commands: Any) -> argparse.ArgumentParser:
    text = "first-token times of the demo for long prompts, cold and from the disk cache"
    restart = commands.add_parser("restart", help=text, description=text)
    restart.add_argument("--tokens", type=int, default=16384, metavar="N", help="of a prompt")
    restart.add_argument("--repeats", type=int, default=3, metavar="N", help="prompts")
    return restart


def add_engine(commands: Any) -> argparse.ArgumentParser:
    text = "the engine's tokens per second ÷ those of a bare jitted decode loop, same batch"
    engine = commands.add_parser("engine", help=text, description=text)
    config = "config.json of the model, which gets random weights (default: the demo's)"
    engine.add_argument("--config", default=str(DEMO_CONFIG), metavar="FILE", help=config)
    engine.add_argument("--batches", type=numbers, default=[8, 32], metavar="B,B")
    steps = "of the engine in one call; default 1,4"
    engine.add_argument("--decode-steps", type=numbers, default=[1, 4], metavar="N,N", help=steps)
    engine.add_argument("--tokens", type=int, default=200, metavar="N", help="a stream")
    engine.add_argument("--repeats", type=int, default=9, metavar="N", help="turns of each")
    return engine


def add_speculate(commands: Any) -> argparse.ArgumentParser:
    text = "tokens per second of a stream with guesses of the MTP block ÷ without, in one run"
    ahead = commands.add_parser("speculate", help=text, description=text)
    made = "made by convert_hf.py; its guesses are only taken if it was trained"
    ahead.add_argument("--checkpoint", required=True, metavar="DIR", help=made)
    chats = 'lines of {"messages": …} (default: a few questions)'
    ahead.add_argument("--chats", metavar="FILE", help=chats)
    ahead.add_argument("--guesses", type=numbers, default=[1], metavar="K,K")
    ahead.add_argument("--batches", type=numbers, default=[1, 8], metavar="B,B")
    ahead.add_argument("--requests", type=int, default=24, metavar="N", help="of a turn")
    ahead.add_argument("--tokens", type=int, default=128, metavar="N", help="of an answer, at most")
    ahead.add_argument("--temperature", type=float, default=0.0, metavar="T")
    ahead.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each")
    return ahead


def add_kernels(commands: Any) -> argparse.ArgumentParser:
    text = "VMEM, SMEM, HBM bytes, FLOPs and floor of kernels and steps, by the TPU compiler"
    kernels = commands.add_parser("kernels", help=text, description=text)
    kernels.add_argument("--op", action="append", metavar="OP", help="default: all; repeatable")
    cases = "cases to compile, such as 'flash_decode_*' (default: those that tests compile)"
    kernels.add_argument("--case", metavar="GLOB", help=cases)
    chips = "v5e, v5p, v6e or TPU7x (default: all); repeatable"
    kernels.add_argument("--chip", action="append", metavar="CHIP", help=chips)
    fold = "one line per case, all chips side by side, when everything is compiled"
    kernels.add_argument("--fold", action="store_true", help=fold)
    return kernels


def bench_model(args: argparse.Namespace) -> None:
    from dsv4_jax.bench import compare

    if not Path(args.config).is_file():
        raise ValueError(f"--config {args.config}: no such file")
    if not args.json:
        print(f"{platform.machine()}, one core, Python {platform.python_version()}\n")
        print(compare.header(bool(args.peer)), flush=True)
    wanted = compare.cases(args.lengths, args.decode_lengths, args.batches)
    for row in compare.compare(args.config, wanted, args.peer):
        print(json.dumps(row) if args.json else compare.line(row), flush=True)


def bench_serve(args: argparse.Namespace) -> None:
    from dsv4_jax.bench import serve

    def run(url: str) -> None:
        load = serve.Load(
            url,
            args.requests,
            args.clients,
            args.rate,
            args.prompt_chars,
            args.max_tokens,
            args.api_key,
            args.seed,
        )
        figures = serve.summary(load, *serve.run(load))
        print(json.dumps(figures) if args.json else serve.table(figures), flush=True)

    if args.url:
        run(args.url)
    else:
        with serve.demo_server() as url:
            run(url)


def bench_turns(args: argparse.Namespace) -> None:
    from dsv4_jax.bench import serve, turns

    def run(url: str) -> None:
        figures = turns.measure(url, args.tokens, args.repeats, args.api_key)
        print(json.dumps(figures) if args.json else turns.line(figures), flush=True)

    if args.url:
        run(args.url)
    else:
        with serve.demo_server() as url:
            run(url)


def bench_restart(args: argparse.Namespace) -> None:
    from functools import partial
    from tempfile import TemporaryDirectory

    from dsv4_jax.bench import serve, turns

    with TemporaryDirectory() as folder:
        room = ("--max-len", str(args.tokens + 2048), "--disk-cache", folder)
        start = partial(serve.demo_server, *room)
        figures = turns.measure_restart(start, args.tokens, args.repeats)
    print(json.dumps(figures) if args.json else turns.restart_line(figures), flush=True)


def bench_engine(args: argparse.Namespace) -> None:
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.serving.engine import overhead

    path = Path(args.config)
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    cfg = ModelConfig.from_hf(json.loads(path.read_text()))
    if not args.json:
        print(overhead.HEADER, flush=True)
    for batch, steps in product(args.batches, args.decode_steps):
        figures = overhead.measure(cfg, Numerics(), batch, args.tokens, args.repeats, steps)
        print(json.dumps(figures) if args.json else overhead.line(figures), flush=True)


def bench_speculate(args: argparse.Namespace) -> None:
    from dsv4_jax.serving.accelerator import use_cpu_if_alone

    use_cpu_if_alone()

    from checkpoints.load import load_checkpoint
    from dsv4_jax.decoded import decoded_if_small
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.serving.engine import speedup

    cfg, params = load_checkpoint(args.checkpoint)
    loaded = cfg, decoded_if_small(cfg, Numerics(), params)
    if not args.json:
        print(speedup.HEADER, flush=True)
    for batch in args.batches:
        for guesses in args.guesses:
            figures = speedup.measure(
                args.checkpoint,
                loaded,
                Numerics(),
                guesses,
                batch,
                args.chats,
                args.requests,
                args.tokens,
                args.temperature,
                args.repeats,
            )
            print(json.dumps(figures) if args.json else speedup.line(figures), flush=True)


def bench_kernels(args: argparse.Namespace) -> None:
    from pallas_kernels import aot, bench

    ops = bench.OPS | {"step": bench.Op("dsv4_jax.bench.step")}
    rows = bench.rows(ops, args.op or list(ops), args.chip or list(aot.CHIPS), args.case)
    if args.fold:
        print(bench.fold(rows))
        return
    if not args.json:
        print(bench.HEADER, flush=True)
    for row in rows:
        print(json.dumps(row) if args.json else bench.line(row), flush=True)


COMMANDS = {
    "model": bench_model,
    "serve": bench_serve,
    "turns": bench_turns,
    "restart": bench_restart,
    "engine": bench_engine,
    "speculate": bench_speculate,
    "kernels": bench_kernels,
}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
