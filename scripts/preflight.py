"""Does it fit, and how fast can it be at most? Compiles a program for a TPU slice without one.

    python scripts/preflight.py --model v4-pro --topology v6e:8x8 --program decode --batch 256
    python scripts/preflight.py --model v4-flash --topology v6e:2x4 --mesh expert=8 --explain
    python scripts/preflight.py --model v4-flash --topology v5p:8x8x8 --program train \
        --mesh fsdp=32,expert=16 --batch 512 --context 4096

Needs the TPU compiler, `pip install 'dsv4_jax[tpu]'`, and no TPU. Answers for one device and one
step: bytes by kind, HBM bytes moved, FLOPs, bytes sent, the floor and the resource that sets it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.preflight.compile import Report
    from sharding.mesh import MeshShape

CHIPS_PER_HOST = 4  # of slices of more than one host


def build_parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="preflight.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = ap.add_argument_group("what runs")
    what.add_argument("--model", required=True, metavar="NAME|FILE", help="preset or config.json")
    what.add_argument("--program", default="decode", help="decode (default), prefill or train")
    what.add_argument("--batch", type=int, default=64, metavar="B", help="sequences or rows in all")
    what.add_argument(
        "--context", type=int, default=8192, metavar="L", help="tokens of room each, or of a row"
    )
    what.add_argument("--chunk", type=int, default=2048, metavar="T", help="of a prefill step")
    what.add_argument(
        "--micro-rows", type=int, default=1, metavar="R", help="that a device trains on at once"
    )
    where = ap.add_argument_group("where")
    where.add_argument("--topology", required=True, metavar="KIND:AxB", help="such as v6e:2x4")
    where.add_argument("--mesh", metavar="AXIS=N,…", help="default: the best of a few by size")
    where.add_argument("--exchange", choices=("gather", "ragged", "padded"), help="of experts")
    out = ap.add_argument_group("answers")
    out.add_argument("--explain", action="store_true", help="every parameter's place; no compiling")
    out.add_argument("--estimate", action="store_true", help="from sizes alone; no compiling")
    out.add_argument("--json", action="store_true", help="JSON instead of text")
    out.add_argument(
        "--cache", metavar="DIR", help="keep what the compiler says; never ask the same twice"
    )
    out.add_argument("--html", metavar="FILE", help="also write a page with bars")
    return ap


def run(args: argparse.Namespace) -> int:
    from pallas_kernels import aot
    from sharding.tpu import overlap_messages

    aot.prepare_environment()
    overlap_messages()
    from dsv4_jax.preflight import command

    cfg = command.model_config(args.model)
    if args.program == "train":
        return train(args, cfg)
    sizes = command.sizes_of(cfg, args.program, args.batch, args.context, args.chunk)
    shape = command.mesh_shape(args.mesh)
    if args.explain or args.estimate:
        tell = command.explain if args.explain else command.estimates
        print(tell(cfg, args.topology, args.program, sizes, shape, args.json))
        if args.explain and shape and not args.json:
            print(loading(args, cfg, shape))
        return 0
    if reason := aot.skip_reason():
        raise ValueError(f"{reason} (--estimate and --explain work without)")

    where = (args.topology, args.program, sizes, shape, args.exchange)
    report = command.compile_one(args.model, cfg, *where, say, cache_of(args))
    return answer(args, report, lambda: command.advice(cfg, report, sizes))


def loading(args: argparse.Namespace, cfg: ModelConfig, shape: MeshShape) -> str:
    from checkpoints import plan
    from dsv4_jax.preflight.programs import rules_of
    from sharding.mesh import MeshSizes, num_chips
    from sharding.shards import Shards

    hosts = max(num_chips(args.topology) // CHIPS_PER_HOST, 1)
    return plan.describe(cfg, Shards(MeshSizes(shape), rules_of(args.program)), hosts)


def train(args: argparse.Namespace, cfg: ModelConfig) -> int:
    from dsv4_jax.preflight import command
    from dsv4_jax.training import preflight
    from pallas_kernels import aot
    from sharding.mesh import MeshSizes
    from sharding.rules import TRAIN
    from sharding.shards import Shards

    sizes = preflight.sizes_of(cfg, args.batch, args.context, args.micro_rows)
    shape = command.mesh_shape(args.mesh)
    if shape is None:
        raise ValueError("--program train needs --mesh")
    command.check_size(shape, args.topology)
    shards = Shards(MeshSizes(shape), TRAIN, split=True)
    preflight.check_fit(cfg, shards, sizes)
    if args.explain:
        rows = list(preflight.explain(cfg, shards))
        as_json = json.dumps([row.to_json() for row in rows]) if args.json else ""
        print(as_json or f"{args.topology}, mesh {shape}\n{preflight.placements(rows)}")
        return 0
    if args.estimate:
        found = preflight.estimate(cfg, args.topology, shards, sizes)
        print(json.dumps(found) if args.json else preflight.estimated(found))
        return 0
    if reason := aot.skip_reason():
        raise ValueError(reason)
    where = (args.topology, sizes, shape, args.exchange)
    report = preflight.run(args.model, cfg, *where, say, cache_of(args))
    return answer(args, report, lambda: command.text(report))


def cache_of(args: argparse.Namespace) -> Path | None:
    return Path(args.cache) if args.cache else None


def answer(args: argparse.Namespace, report: Report, as_text: Callable[[], str]) -> int:
    from dsv4_jax.preflight import command

    if args.html:
        Path(args.html).write_text(command.page([report]), encoding="utf-8")
    print(json.dumps(report.to_json()) if args.json else as_text())
    return 0 if report.fits else 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"preflight.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
