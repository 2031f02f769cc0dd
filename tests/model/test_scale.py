"""Depth and length: what may not grow with them. Times are printed, never asserted."""

import functools
import time
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import presets
from dsv4_jax.cache import init_cache
from dsv4_jax.config import Yarn
from dsv4_jax.model import decode_step, group_params, prefill
from dsv4_jax.params import abstract, unit_specs
from tests.model.support import PLAIN, REFERENCE

DEPTHS = (6, 22, 62)
SAME_SIZE = 1.02
MAX_GROWTH = 3


def deep_config(layers):
    """The schedule of the released models: two layers of one kind, then pairs of the other two."""
    pairs = (layers - 2) // 2
    return presets.tiny().replace(
        num_layers=layers,
        compress_ratios=(0, 0, *(4, 8) * pairs, 0),
        num_hash_layers=2,
        dim=32,
        expert_dim=32,
        head_dim=16,
        rope_dim=8,
        index_dim=8,
        yarn=Yarn(original_len=64),
    )


@functools.cache
def abstract_params(layers):
    cfg = deep_config(layers)
    units = abstract(cfg, unit_specs(cfg))

    def zeros(unit):
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), units[unit])

    return jax.eval_shape(lambda: group_params(cfg, zeros))


def traced(layers, num, size):
    """A prefill of `size` tokens, as a jaxpr and lowered, and the seconds that took."""
    cfg, params = deep_config(layers), abstract_params(layers)
    begin = time.perf_counter()
    cache = jax.eval_shape(lambda: init_cache(cfg, 1, 64, num))
    tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)
    trace = jax.jit(partial(prefill, cfg, num)).trace(params, tokens, cache)
    lowered = trace.lower()
    return count_equations(trace.jaxpr.jaxpr), lowered, time.perf_counter() - begin


def count_equations(jaxpr):
    total = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_equations(inner)
    return total


@pytest.mark.parametrize("num, size", [(PLAIN, 16), (REFERENCE, 16), (REFERENCE, 1)])
def test_programs_do_not_grow_with_depth(num, size):
    equations, texts = [], []
    for layers in DEPTHS:
        count, lowered, _ = traced(layers, num, size)
        equations.append(count)
        texts.append(len(lowered.as_text()))
    assert len(set(equations)) == 1
    assert max(texts) <= SAME_SIZE * min(texts)


@pytest.mark.slow
def test_compile_times_of_depths():
    """Prints the seconds that tracing and compiling take at each depth."""
    sizes = []
    for layers in DEPTHS:
        _, lowered, seconds = traced(layers, REFERENCE, 16)
        begin = time.process_time()
        compiled = lowered.compile()
        compile_s = time.process_time() - begin
        sizes.append(len(compiled.as_text()))
        print(f"depth | {layers} layers | traced in {seconds:.1f} s, compiled in {compile_s:.1f} s")
    assert max(sizes) <= SAME_SIZE * min(sizes)


@pytest.mark.slow
def test_work_of_a_decode_step_does_not_grow_with_capacity():
    """Counted operations and bytes of one step with room for 32,768 tokens, against 1,024."""
    costs = {}
    for length in (1024, 32768):
        cfg = deep_config(6).replace(max_len=32768)
        params = abstract_params(6)
        cache = jax.eval_shape(lambda cfg=cfg, length=length: init_cache(cfg, 1, length, REFERENCE))
        tokens = jax.ShapeDtypeStruct((1,), jnp.int32)
        step = jax.jit(partial(decode_step, cfg, REFERENCE), donate_argnums=2)
        costs[length] = step.lower(params, tokens, cache).compile().cost_analysis()
    for name in ("flops", "bytes accessed"):
        short, long = (costs[length][name] for length in (1024, 32768))
        print(f"decode step | {name} | {short:.3g} at 1,024, {long:.3g} at 32,768")
    assert costs[32768]["flops"] <= MAX_GROWTH * costs[1024]["flops"]
