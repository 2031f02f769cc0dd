"""From settings and a checkpoint to a ready engine, saying on the way what is going on."""

import atexit
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

from dsv4_jax import encoding
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import abstract, unit_specs
from dsv4_jax.serving.compile_cache import use_compile_cache
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import Sizes
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import memory_plan, plan_sizes
from dsv4_jax.serving.launch import fingerprint, how_to_use
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.service import Service
from dsv4_jax.tokenizer import Tokenizer

DEFAULT_MAX_LEN = 131_072
GIB = 1 << 30
say = partial(print, flush=True)


@dataclass(frozen=True)
class Plan:
    """What will be loaded; nothing of it is in memory yet."""

    name: str  # of the model, to clients
    num: Numerics
    tokenizer: Tokenizer
    profile: encoding.Profile
    max_len: int
    scheduling: SchedulerConfig
    sizes: Sizes


def make_plan(args: SimpleNamespace, cfg: ModelConfig, folder: str, name: str) -> Plan:
    """Checks the settings against the checkpoint in `folder` and shows what they come to.

    Raises:
        ValueError: they do not go together; the message names the setting.
    """
    tokenizer = Tokenizer.from_dir(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model {cfg.vocab_size}"
        raise ValueError(f"{tokenizer.source} belongs to another model: it has {sizes}")
    max_len = min(cfg.max_len, DEFAULT_MAX_LEN) if args.max_len is None else args.max_len
    if max_len > cfg.max_len:
        raise ValueError(f"--max-len {max_len} must not exceed the model's {cfg.max_len}")
    scheduling, sizes = plan_sizes(cfg, max_len, args.slots, args.cache_tokens)
    auto = args.prompt_profile == "auto"
    profile = encoding.detect_profile_in(folder) if auto else args.prompt_profile
    num = Numerics(args.numerics, args.dtype, args.implementation)
    say(f"model    {name}: {cfg.num_layers} layers, {args.checkpoint or 'the demo'}")
    say(f"context  {max_len:,} of {cfg.max_len:,} tokens (--max-len)")
    say(f"prompts  {profile} profile, thinking effort {args.default_effort} unless asked otherwise")
    say(f"devices  {len(jax.devices())} × {jax.devices()[0].device_kind}")
    how = args.implementation or ("pallas" if num.kernels else "reference")
    say(f"numbers  {args.numerics} numerics, {args.dtype}, {how} implementation")
    say(f"memory   {memory_plan(cfg, num, abstract(cfg, unit_specs(cfg)), sizes)}")
    return Plan(name, num, tokenizer, profile, max_len, scheduling, sizes)


def start(
    args: SimpleNamespace,
    folder: str,
    plan: Plan,
    load: Callable[..., tuple[ModelConfig, Any]],
    service: Service,
    url: str,
) -> None:
    """Loads and compiles, then lets requests in and says how to send some.

    `load(folder, progress=…)` gives configuration and parameters; `progress` takes parts done
    and parts in all.
    """
    begin = time.monotonic()
    if (cache := use_compile_cache(args.compile_cache)) is not None:
        say(f"programs {cache} (--compile-cache)")

    def progress(done: int, total: int) -> None:
        service.percent = 80 * done // total
        is_last = done == total or not sys.stdout.isatty()
        say(f"loading  {done} of {total} parts", end="\n" if is_last else "\r")

    cfg, params = load(folder, progress=progress)
    how = f"{plan.profile} {args.numerics} {args.dtype} {plan.num.kernels}"
    name = fingerprint(Path(folder, "manifest.json").read_bytes(), how.encode())
    engine = Engine(
        cfg,
        plan.num,
        params,
        plan.scheduling,
        plan.sizes,
        name,
        host_cache_bytes=int(args.host_cache_gib * GIB),
        step_timeout_s=args.step_timeout,
        model_name=plan.name,
    )
    say("compiling …")
    service.phase = "compiling"
    engine.warm_up()
    engine.start()
    atexit.register(engine.stop)
    planner = Planner(
        plan.tokenizer,
        plan.profile,
        plan.max_len,
        args.default_effort,
        args.loop_guard,
        args.free_controls,
    )
    service.ready(planner, engine, name)
    say(f"ready after {time.monotonic() - begin:.0f} s\n")
    say(how_to_use(url, bool(args.api_key)))
