"""Serves a checkpoint over an OpenAI-compatible HTTP API, with a chat page at /.

python scripts/serve.py                            the demo, on http://127.0.0.1:8000
python scripts/serve.py --checkpoint runs/v4-flash
python scripts/serve.py --checkpoint runs/v4-flash --dry-run    only what it would take
python scripts/serve.py --checkpoint runs/v4-pro --coordinator auto    on every host of a slice
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from dsv4_jax.serving.accelerator import use_cpu_if_alone
from dsv4_jax.serving.errors import ServerFailed
from dsv4_jax.serving.options import OPTIONS, most_waiting, reasoning_fields
from dsv4_jax.serving.settings import UsageError, resolve
from sharding.tpu import overlap_messages

if TYPE_CHECKING:
    from dsv4_jax.serving.hosts import Follower, Leader
    from dsv4_jax.serving.service import Service, Settings

DEMO = Path(__file__).parents[1] / "dsv4_jax" / "data" / "demo"
DEMO_NOTICE = (
    "This is a demo: a tiny model that adds, copies, finds facts in a text and calls tools. "
    "It knows nothing else."
)
DEMO_EXAMPLES = (
    "What is 37+58?",
    "What is 75 - 31?",
    "The code of Anna is 4721.\nNobody saw the drum near the door.\n"
    "The colour of the red mule is amber.\nIn the morning the barn looked smaller.\n\n"
    "What is the code of Anna?",
)
DEMO_MAX_LEN = 10240  # it has learnt to find things in 8K tokens
say = partial(print, flush=True)
EPILOG = """Every setting is also a key of the --config file (max-len) and an environment variable
(DSV4_MAX_LEN). A flag wins over a variable, a variable over the file.
Exit status: 0 stopped, 1 failed, 2 usage."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(args: SimpleNamespace, folder: str) -> None:
    from dsv4_jax.serving.hosts import Follower, connect
    from dsv4_jax.serving.launch import listen, serve, url_of
    from dsv4_jax.serving.service import Service

    names = args.served_model_name or (Path(args.checkpoint or "dsv4-demo").resolve().name,)
    if args.dry_run:
        return load(args, folder, names[0])
    service = Service(settings_of(args, names))
    line = connect(args.coordinator)
    if isinstance(line, Follower):
        return follow(args, folder, names[0], line)
    if args.compile_only:
        return load(args, folder, names[0], service, line=line)
    listener = listen(args.host, args.port)
    if args.host not in LOOPBACK and not args.api_key:
        print(f"serve.py: warning: anyone who reaches {args.host} can use this", file=sys.stderr)
    url = url_of(listener)
    if line is not None:
        line.watch(service.fail)
    serve(
        service,
        listener,
        lambda: load(args, folder, names[0], service, url, line),
        args.drain_timeout,
        args.client_stall_timeout,
    )


def settings_of(args: SimpleNamespace, names: tuple[str, ...]) -> Settings:
    from dsv4_jax.serving.service import Settings

    return Settings(
        names,
        None if args.checkpoint else DEMO_NOTICE,
        args.api_key,
        args.admin_key,
        answers_any_name=args.any_model,
        refuses_unknown_fields=args.strict_fields,
        reasoning_fields=reasoning_fields(args),
        metrics_prefix=f"{args.metrics_prefix}:",
        health_timeout_s=args.health_timeout,
        logs_prompts=args.log_prompts,
        examples=() if args.checkpoint else DEMO_EXAMPLES,
        parallel=args.slots + most_waiting(args),
        max_waiting=0,  # they wait in the engine, where tenants take turns
    )


def load(
    args: SimpleNamespace,
    folder: str,
    name: str,
    service: Service | None = None,
    url: str = "",
    line: Leader | None = None,
) -> None:
    """Shows the plan and, given a service, makes it ready."""
    from checkpoints.load import load_checkpoint
    from checkpoints.store import load_config
    from dsv4_jax.serving.start import make_plan, start

    plan = make_plan(args, load_config(folder), folder, name)
    if service is not None:
        start(args, folder, plan, load_checkpoint, service, url, line)


def follow(args: SimpleNamespace, folder: str, name: str, line: Follower) -> None:
    """Computes what the first host says; it has the HTTP server, so it decides when to stop."""
    from checkpoints.load import load_checkpoint
    from checkpoints.store import load_config
    from dsv4_jax.serving import start

    for sort in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sort, stop_later)
    plan = start.make_plan(args, load_config(folder), folder, name)
    start.follow(args, folder, plan, load_checkpoint, line)


def stop_later(sort: int, frame: object) -> None:
    say("this host stops when the first one does; another signal stops it at once")
    signal.signal(sort, signal.default_int_handler)


def run_demo(args: SimpleNamespace) -> None:
    from checkpoints.convert import convert
    from checkpoints.progress import Progress

    say(f"{DEMO_NOTICE}\nUse --checkpoint DIR to serve a real one.\n")
    with tempfile.TemporaryDirectory(prefix="dsv4-demo-") as folder:
        convert(DEMO, folder, progress=Progress("convert", quiet=True))
        args.max_len = args.max_len or DEMO_MAX_LEN
        run(args, folder)


def main(argv: list[str] | None = None) -> int:
    try:
        found = resolve(OPTIONS, argv, prog="serve.py", description=__doc__, epilog=EPILOG)
    except UsageError as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return 2
    if found.wants_print:
        say(found.to_yaml())
        return 0
    args = found.namespace()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("dsv4_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates its steps
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as for Ctrl-C
    if not use_cpu_if_alone():
        overlap_messages()
    try:
        if args.coordinator or args.hosts or args.host_index is not None:
            from sharding.processes import join

            if not args.checkpoint:
                raise ValueError("several hosts need --checkpoint: the demo is for one")
            join(args.coordinator, args.hosts, args.host_index)
        run(args, args.checkpoint) if args.checkpoint else run_demo(args)
    except (ConnectionError, ServerFailed) as error:
        print(f"serve.py: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # what lost a process, or a step of its engine, cannot be taken down in order
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say_if_heard("stopped")
    return 0


def say_if_heard(text: str) -> None:
    """As `say`, but nobody may be reading any more."""
    try:
        say(text)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or leaving would try again


if __name__ == "__main__":
    sys.exit(main())
