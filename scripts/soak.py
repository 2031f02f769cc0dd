"""Soaks a server in mixed traffic and fails if it makes mistakes or grows.

python scripts/soak.py --minutes 20                          a demo server of its own
python scripts/soak.py --url http://127.0.0.1:8000 --pid 1234
"""

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dsv4_jax.serving.child import own_server
from dsv4_jax.serving.client import Client, ServerError
from dsv4_jax.serving.soak.run import Soak
from dsv4_jax.serving.soak.watch import Bounds

SERVE = Path(__file__).with_name("serve.py")
say = partial(print, flush=True)


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="soak.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 fine, 1 mistakes or growth, 2 usage.",
    )
    ap.add_argument("--url", help="server to soak; default: a demo server of its own")
    ap.add_argument("--pid", type=int, help="its process, on this machine; needed with --url")
    ap.add_argument("--minutes", type=float, default=20, metavar="M", help="default: %(default)s")
    ap.add_argument("--workers", type=int, default=8, metavar="N", help="default: %(default)s")
    ap.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    ap.add_argument("--json", metavar="FILE", help="write counts and looks there")
    bounds = ap.add_argument_group("growth allowed after the first quarter of the time")
    for name, value in asdict(Bounds()).items():
        flag = "--" + name.replace("_", "-")
        bounds.add_argument(
            flag, type=type(value), default=value, metavar="N", help="default: %(default)s"
        )
    return ap


def run(args: argparse.Namespace, stack: ExitStack) -> int:
    url, pid = args.url, args.pid
    if url is None:
        url, pid = stack.enter_context(own_server(SERVE, [], say))
    client = Client(url)
    client.wait_ready(say)
    bounds = Bounds(**{name: getattr(args, name) for name in asdict(Bounds())})
    soak = Soak(client, pid, args.minutes, args.workers, args.seed, bounds=bounds, report=say)
    problems = soak.run()
    say(f"\n{soak.done.total()} requests: {dict(soak.done.most_common())}")
    if args.json:
        looks = [asdict(look) for look in soak.looks]
        found = {"requests": soak.done, "looks": looks, "problems": problems}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for problem in problems:
        say(f"WRONG: {problem}")
    say("failed" if problems else "fine: no mistakes, no growth beyond the bounds")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    ap = parser()
    args = ap.parse_args(argv)
    if (args.url is None) != (args.pid is None):
        ap.error("--url and --pid go together")
    if args.minutes <= 0 or args.workers < 1:
        ap.error("--minutes and --workers must be positive")
    try:
        with ExitStack() as stack:
            return run(args, stack)
    except (ValueError, ServerError) as error:
        print(f"soak.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
