"""From settings and a checkpoint to a ready engine, saying on the way what is going on."""

import atexit
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from jax.sharding import Mesh

from dsv4_jax import encoding
from dsv4_jax.config import ModelConfig
from dsv4_jax.decoded import decode_once, decodes
from dsv4_jax.numerics import Numerics
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.compile_cache import use_compile_cache
from dsv4_jax.serving.counters import BUILD
from dsv4_jax.serving.engine import mirror
from dsv4_jax.serving.engine.blobs import check_folder
from dsv4_jax.serving.engine.config import SchedulerConfig
from dsv4_jax.serving.engine.device import Sizes
from dsv4_jax.serving.engine.loop import DiskCache, Engine
from dsv4_jax.serving.engine.programs import Programs
from dsv4_jax.serving.engine.sizing import memory_plan, page_for, plan_sizes
from dsv4_jax.serving.engine.stream import EngineError
from dsv4_jax.serving.engine.waiting import QueueLimits
from dsv4_jax.serving.generation import read_generation
from dsv4_jax.serving.hosts import Follower, Leader
from dsv4_jax.serving.launch import fingerprint, how_to_use
from dsv4_jax.serving.mesh import shards_for
from dsv4_jax.serving.options import most_waiting
from dsv4_jax.serving.plan import Planner
from dsv4_jax.serving.rules import Rules
from dsv4_jax.serving.service import Service
from dsv4_jax.tokenizer import Tokenizer
from sharding.mesh import shape_of
from sharding.shards import Shards

DEFAULT_MAX_LEN = 131_072
TESTED_TOKENS = 4  # that the model must say before requests are let in
GIB = 1 << 30
WIDEST_LINE = 60  # of those that replace each other on a terminal
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
    shards: Shards
    decodes: bool  # weights once, when they are loaded
    sampling: dict[str, Any]  # where requests name none


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
    if args.disk_cache is not None:
        try:
            check_folder(args.disk_cache)  # now, not after the weights are loaded
        except ValueError as error:
            raise ValueError(f"--disk-cache: {error}") from None
    num = Numerics(args.numerics, args.dtype, args.implementation)
    page = page_for(num)
    guesses, rejects = guesses_for(args, cfg), args.speculate_mode == "rejection"
    rejects = guesses > 0 and rejects
    scheduling, sizes = plan_sizes(
        cfg, max_len, args.slots, args.cache_tokens, page, guesses, rejects, args.decode_steps
    )
    scheduling = replace(scheduling, queue=queue_limits(args))
    shards = shards_for(cfg, args.mesh, jax.devices())
    auto = args.prompt_profile == "auto"
    profile = encoding.detect_profile_in(folder) if auto else args.prompt_profile
    say(f"model    {name}: {cfg.num_layers} layers, {args.checkpoint or 'the demo'}")
    say(f"context  {max_len:,} of {cfg.max_len:,} tokens (--max-len)")
    say(f"prompts  {profile} profile, thinking effort {args.default_effort} unless asked otherwise")
    used = f", mesh {shape_of(shards.mesh)}" if isinstance(shards.mesh, Mesh) else ""
    say(f"devices  {len(jax.devices())} × {jax.devices()[0].device_kind}{used} (--mesh)")
    how = args.implementation or ("pallas" if num.kernels else "reference")
    say(f"numbers  {args.numerics} numerics, {args.dtype}, {how} implementation")
    if guesses:
        say(f"guesses  {guesses} ahead by the MTP block, {args.speculate_mode} (--speculate)")
    if sizes.burst > 1:
        say(f"steps    {sizes.burst} in one call while no prompt waits (--decode-steps)")
    once = decodes(args.decode_weights, cfg, num, shards)
    say(f"memory   {memory_plan(cfg, num, sizes, shards, once)}")
    sampling = read_generation(folder) if args.generation_config == "auto" else {}
    if sampling:
        shown = ", ".join(f"{name} {value:g}" for name, value in sampling.items())
        say(f"sampling {shown} unless asked otherwise (--generation-config)")
    sized = max_len, scheduling, sizes, shards, once
    return Plan(name, num, tokenizer, profile, *sized, sampling)


def queue_limits(args: SimpleNamespace) -> QueueLimits:
    """What the settings say of the queue; the engine also queues what is about to start."""
    most = args.slots + most_waiting(args)
    return QueueLimits(
        requests=most,
        tokens=args.max_waiting_tokens,
        tenant_requests=args.tenant_waiting or most,
        tenant_slots=args.tenant_running or args.slots,
        timeout_s=args.queue_timeout,
    )


def guesses_for(args: SimpleNamespace, cfg: ModelConfig) -> int:
    """Tokens to guess ahead; by default none on a CPU, where a step costs what it computes.

    Raises:
        ValueError: the model cannot guess.
    """
    if args.speculate and args.decode_steps > 1:
        raise ValueError(f"--decode-steps {args.decode_steps} does not go with --speculate")
    if args.speculate is None:
        can = cfg.num_mtp_layers > 0 and args.decode_steps == 1
        return int(can and jax.default_backend() != "cpu")
    if args.speculate and not cfg.num_mtp_layers:
        raise ValueError(f"--speculate {args.speculate}: this checkpoint has no MTP block")
    return args.speculate


def start(
    args: SimpleNamespace,
    folder: str,
    plan: Plan,
    load: Callable[..., tuple[ModelConfig, Any]],
    service: Service,
    url: str,
    line: Leader | None = None,
) -> None:
    """Loads and compiles, then lets requests in and says how to send some.

    `load(folder, progress=…, shards=…)` gives configuration and parameters; `progress` takes parts
    done and parts in all. `line`: to the other processes of the job.

    Raises:
        ValueError: settings that contradict each other.
    """
    if args.compile_only and args.compile_cache == "off":
        raise ValueError("--compile-only keeps nothing with --compile-cache off")
    begin = time.monotonic()
    cfg, params = _loaded(args, folder, plan, load, service)
    how = f"{plan.profile} {args.numerics} {args.dtype} {plan.num.kernels} {_where(plan)}"
    name = fingerprint(Path(folder, "manifest.json").read_bytes(), how.encode())
    folder_of, disk_bytes = args.disk_cache, int(args.disk_cache_gib * GIB)
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
        metrics_prefix=f"{args.metrics_prefix}:",
        shards=plan.shards,
        channel=line,
        disk_cache=None if folder_of is None else DiskCache(folder_of, disk_bytes),
        adapts=not args.speculate_always,
    )
    if engine.disk is not None:
        service.replay.blobs = engine.disk.store
        used = f"{engine.disk.store.used / GIB:.1f} of {args.disk_cache_gib:g} GiB"
        say(f"disk     {folder_of}: {used} (--disk-cache)")
    service.on_fatal = engine.fail
    service.phase = "compiling"
    engine.warm_up(partial(_compiling, service, time.monotonic()))
    if args.compile_only:
        engine.stop()
        return say(f"compiled after {time.monotonic() - begin:.0f} s")
    engine.start()
    atexit.register(engine.stop)
    rules = Rules(
        default_effort=args.default_effort,
        loop_guard=args.loop_guard,
        frees_controls=args.free_controls,
        official_sampling=args.official_sampling,
        requires_reasoning=args.require_reasoning,
        internal_roles=args.internal_roles,
        tool_grammar=args.tool_grammar,
        recovers_lookalikes=args.recover_lookalike_dsml,
        sampling=plan.sampling,
        special_tokens_in_text=args.special_tokens_in_text,
    )
    planner = Planner(plan.tokenizer, plan.profile, plan.max_len, rules)
    planner.prepare()
    service.phase = "testing"
    self_test(engine, plan.tokenizer.bos_id)
    service.ready(planner, engine, fingerprint(name.encode(), repr(rules).encode()))
    say(f"ready after {time.monotonic() - begin:.0f} s\n")
    say(how_to_use(url, bool(args.api_key), service.settings.names[0]))


def self_test(engine: Engine, first: int) -> None:
    """Lets the model say a few tokens behind token `first`.

    Raises:
        ValueError: it cannot.
    """
    greedy = SamplingParams(TESTED_TOKENS, temperature=0.0)
    try:
        for _ in engine.stream([first], greedy, frozenset()):
            pass
    except EngineError as error:
        raise ValueError(f"the model fails its first test: {error.__cause__ or error}") from error


def follow(
    args: SimpleNamespace,
    folder: str,
    plan: Plan,
    load: Callable[..., tuple[ModelConfig, Any]],
    line: Follower,
) -> None:
    """Loads as `start` does, then computes what the first process of the job says until it ends.

    Raises:
        ProcessLost: the first process is gone.
    """
    cfg, params = _loaded(args, folder, plan, load)
    programs = Programs(cfg, plan.num, params, plan.sizes, plan.shards)
    say(f"process {jax.process_index()} of {jax.process_count()} follows the first one")
    mirror.follow(programs, line)


def _where(plan: Plan) -> str:
    """What else decides the last bits of what is computed."""
    kind, mesh = jax.devices()[0].device_kind, plan.shards.mesh
    shape = shape_of(mesh) if isinstance(mesh, Mesh) else ""
    steps = f"{plan.sizes.guesses} {plan.sizes.burst}"
    sizes = f"{plan.sizes.page_tokens} {steps} {plan.decodes}"
    return f"{BUILD} {kind} {shape} {sizes}"


def _compiling(service: Service, begin: float, done: int, total: int) -> None:
    """Tells of programs that are compiled, and how long the others will take."""
    service.percent = 80 + 20 * done // total
    text = f"compiling {done} of {total} programs"
    if 0 < done < total:
        text += f", about {(time.monotonic() - begin) / done * (total - done):.0f} s left"
    _tell(text, done == total)


def _tell(text: str, is_last: bool) -> None:
    """A line in place of the one before, on a terminal."""
    if not sys.stdout.isatty():
        return say(text)
    say(f"{text:<{WIDEST_LINE}}", end="\n" if is_last else "\r")


def _loaded(
    args: SimpleNamespace,
    folder: str,
    plan: Plan,
    load: Callable[..., tuple[ModelConfig, Any]],
    service: Service | None = None,
) -> tuple[ModelConfig, Any]:
    if (cache := use_compile_cache(args.compile_cache)) is not None:
        say(f"programs {cache} (--compile-cache)")

    def progress(done: int, total: int) -> None:
        if service is not None:
            service.percent = 80 * done // total
        _tell(f"loading  {done} of {total} parts", done == total)

    spread = None if plan.shards.mesh is None else plan.shards
    cfg, params = load(folder, progress=progress, shards=spread)
    return cfg, decode_once(params) if plan.decodes else params
