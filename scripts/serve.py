"""Serves a checkpoint over an OpenAI-compatible HTTP API, with a chat page at /.

python scripts/serve.py                            the demo, on http://127.0.0.1:8000
python scripts/serve.py --checkpoint runs/v4-flash
"""

from __future__ import annotations

import argparse
import atexit
import logging
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_jax.serving.schema import EFFORTS

if TYPE_CHECKING:
    from dsv4_jax.serving.service import Service

DEMO = Path(__file__).parents[1] / "dsv4_jax" / "data" / "demo"
DEMO_NOTICE = "This is a demo: a tiny model with random weights. The text it writes is noise."
say = partial(print, flush=True)
DEFAULT_MAX_LEN = 131_072
WAITING_PER_SLOT, MAX_WAITING = 4, 256  # requests that wait in the engine, where tenants take turns
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be finite and not negative")
    return value


def build_parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(
        prog="serve.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 stopped, 1 failed, 2 usage.",
    )
    model = ap.add_argument_group("model")
    model.add_argument("--checkpoint", metavar="DIR", help="made by convert_hf.py; default: demo")
    model.add_argument("--max-len", type=int, metavar="N", help="context limit in tokens")
    model.add_argument("--slots", type=int, default=8, metavar="N", help="requests at a time")
    held = "tokens of context kept, in use or for reuse; default: two full contexts"
    model.add_argument("--cache-tokens", type=int, metavar="N", help=held)
    host = "host memory for reusable context that leaves the device, in GiB; default 0: none"
    model.add_argument("--host-cache-gib", type=float, default=0.0, metavar="G", help=host)
    model.add_argument("--numerics", choices=("reference", "plain"), default="reference")
    model.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    run = ap.add_argument_group("operation")
    cache = "compiled programs are kept here; 'off': nowhere; default: the user's cache folder"
    run.add_argument("--compile-cache", metavar="DIR|off", help=cache)
    drain = "time to finish running answers after SIGTERM; default 60"
    run.add_argument("--drain-timeout", type=seconds, default=60.0, metavar="S", help=drain)
    step = "a step of the engine that takes longer ends it; default 300"
    run.add_argument("--step-timeout", type=seconds, default=300.0, metavar="S", help=step)
    http = ap.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", metavar="H", help="default 127.0.0.1")
    http.add_argument("--port", type=int, default=8000, metavar="P", help="default 8000; 0: any")
    http.add_argument(
        "--api-key", action="append", metavar="K", help="clients need one of these; repeatable"
    )
    http.add_argument(
        "--served-model-name", action="append", metavar="NAME", help="repeatable; default: DIR's"
    )
    prompt = ap.add_argument_group("prompt")
    effort = "of thinking, if a request names none; default high"
    prompt.add_argument("--default-effort", choices=EFFORTS, default="high", help=effort)
    loops = "close reasoning that goes in circles"
    prompt.add_argument("--loop-guard", action="store_true", help=loops)
    profile = "the prompts the model was trained on; default auto: look at the checkpoint"
    profiles = ("auto", "preview", "official")
    prompt.add_argument("--prompt-profile", choices=profiles, default="auto", help=profile)
    return ap


def load(args: argparse.Namespace, folder: str, service: Service, url: str) -> None:
    """Loads and compiles, then lets requests in and says how to send some."""
    import jax

    from checkpoints.load import load_checkpoint
    from checkpoints.store import load_config
    from dsv4_jax import encoding
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.serving.compile_cache import use_compile_cache
    from dsv4_jax.serving.engine.loop import Engine
    from dsv4_jax.serving.engine.sizing import memory_plan, plan_sizes
    from dsv4_jax.serving.launch import fingerprint, how_to_use
    from dsv4_jax.serving.plan import Planner
    from dsv4_jax.tokenizer import Tokenizer

    start = time.monotonic()
    cfg, tokenizer = load_config(folder), Tokenizer.from_dir(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model {cfg.vocab_size}"
        raise ValueError(f"{tokenizer.source} belongs to another model: it has {sizes}")
    max_len = min(cfg.max_len, DEFAULT_MAX_LEN) if args.max_len is None else args.max_len
    if not 1 <= max_len <= cfg.max_len:
        raise ValueError(f"--max-len {max_len} must lie between 1 and the model's {cfg.max_len}")
    scheduling, sizes = plan_sizes(cfg, max_len, args.slots, args.cache_tokens)
    auto = args.prompt_profile == "auto"
    profile = encoding.detect_profile_in(folder) if auto else args.prompt_profile
    say(f"model    {service.settings.names[0]}: {cfg.num_layers} layers, {args.checkpoint or DEMO}")
    say(f"context  {max_len:,} of {cfg.max_len:,} tokens (--max-len)")
    say(f"prompts  {profile} profile, thinking effort {args.default_effort} unless asked otherwise")
    say(f"devices  {len(jax.devices())} × {jax.devices()[0].device_kind}")
    say(f"numbers  {args.numerics} numerics, {args.dtype}")
    if (cache := use_compile_cache(args.compile_cache)) is not None:
        say(f"programs {cache} (--compile-cache)")

    def progress(done: int, total: int) -> None:
        service.percent = 80 * done // total
        is_last = done == total or not sys.stdout.isatty()
        say(f"loading  {done} of {total} parts", end="\n" if is_last else "\r")

    cfg, params = load_checkpoint(folder, progress=progress)
    weights = Path(folder, "manifest.json").read_bytes()
    how = f"{profile} {args.numerics} {args.dtype}"
    name = fingerprint(weights, how.encode())
    num = Numerics(args.numerics, args.dtype)
    say(f"memory   {memory_plan(cfg, num, params, sizes)}")
    engine = Engine(
        cfg,
        num,
        params,
        scheduling,
        sizes,
        name,
        host_cache_bytes=int(args.host_cache_gib * (1 << 30)),
        step_timeout_s=args.step_timeout,
    )
    say("compiling …")
    service.phase = "compiling"
    engine.warm_up()
    engine.start()
    atexit.register(engine.stop)
    planner = Planner(tokenizer, profile, max_len, args.default_effort, args.loop_guard)
    service.ready(planner, engine, name)
    say(f"ready after {time.monotonic() - start:.0f} s\n")
    say(how_to_use(url, bool(args.api_key)))


def run(args: argparse.Namespace, folder: str) -> None:
    from dsv4_jax.serving.launch import listen, serve, url_of
    from dsv4_jax.serving.service import Service, Settings

    names = args.served_model_name or [Path(args.checkpoint or "dsv4-demo").resolve().name]
    listener = listen(args.host, args.port)
    if args.host not in LOOPBACK and not args.api_key:
        print(f"serve.py: warning: anyone who reaches {args.host} can use this", file=sys.stderr)
    notice = None if args.checkpoint else DEMO_NOTICE
    followed = args.slots + min(WAITING_PER_SLOT * args.slots, MAX_WAITING)
    keys = tuple(args.api_key or ())
    service = Service(Settings(tuple(names), notice, keys, parallel=followed, max_waiting=0))
    url = url_of(listener)
    serve(service, listener, lambda: load(args, folder, service, url), args.drain_timeout)


def run_demo(args: argparse.Namespace) -> None:
    from checkpoints.convert import convert
    from checkpoints.progress import Progress

    say(f"{DEMO_NOTICE}\nUse --checkpoint DIR to serve a real one.\n")
    with tempfile.TemporaryDirectory(prefix="dsv4-demo-") as folder:
        convert(DEMO, folder, progress=Progress("convert", quiet=True))
        run(args, folder)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dsv4_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates its steps
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # in the end, as for Ctrl-C
    try:
        run(args, args.checkpoint) if args.checkpoint else run_demo(args)
    except (ValueError, OSError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
