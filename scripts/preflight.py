"""Does it fit, and how fast can it be at most? Compiles a program for a TPU slice without one.

    python scripts/preflight.py --model v4-pro --topology v6e:8x8 --program decode --batch 256
    python scripts/preflight.py --model v4-flash --topology v6e:2x4 --mesh expert=8 --explain

Needs the TPU compiler, `pip install 'dsv4_jax[tpu]'`, and no TPU. Answers for one device and one
step: bytes by kind, HBM bytes moved, FLOPs, bytes sent, the floor and the resource that sets it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="preflight.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = ap.add_argument_group("what runs")
    what.add_argument("--model", required=True, metavar="NAME|FILE", help="preset or config.json")
    what.add_argument("--program", default="decode", help="decode or prefill; default decode")
    what.add_argument("--batch", type=int, default=64, metavar="B", help="sequences in all")
    what.add_argument("--context", type=int, default=8192, metavar="L", help="tokens of room each")
    what.add_argument("--chunk", type=int, default=2048, metavar="T", help="of a prefill step")
    where = ap.add_argument_group("where")
    where.add_argument("--topology", required=True, metavar="KIND:AxB", help="such as v6e:2x4")
    where.add_argument("--mesh", metavar="AXIS=N,…", help="default: the best of a few by size")
    where.add_argument("--exchange", choices=("gather", "ragged", "padded"), help="of experts")
    out = ap.add_argument_group("answers")
    out.add_argument("--explain", action="store_true", help="every parameter's place; no compiling")
    out.add_argument("--estimate", action="store_true", help="from sizes alone; no compiling")
    out.add_argument("--json", action="store_true", help="JSON instead of text")
    out.add_argument("--html", metavar="FILE", help="also write a page with bars")
    return ap


def run(args: argparse.Namespace) -> int:
    from pallas_kernels import aot

    aot.prepare_environment()
    from dsv4_jax.preflight import command

    cfg = command.model_config(args.model)
    sizes = command.sizes_of(cfg, args.program, args.batch, args.context, args.chunk)
    shape = command.mesh_shape(args.mesh)
    if args.explain or args.estimate:
        tell = command.explain if args.explain else command.estimates
        print(tell(cfg, args.topology, args.program, sizes, shape, args.json))
        return 0
    if reason := aot.skip_reason():
        raise ValueError(f"{reason} (--estimate and --explain work without)")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    where = (args.topology, args.program, sizes, shape, args.exchange)
    report = command.compile_one(args.model, cfg, *where, say)
    if args.html:
        Path(args.html).write_text(command.page([report]), encoding="utf-8")
    print(json.dumps(report.to_json()) if args.json else command.advice(cfg, report, sizes))
    return 0 if report.fits else 1


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
