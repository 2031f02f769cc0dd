"""The serving engine over a mesh says what it says on one device."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest

from dsv4_jax import presets
from dsv4_jax.numerics import Numerics
from dsv4_jax.placement import param_specs, shardings
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.serving.engine.device import memory
from dsv4_jax.serving.engine.loop import Engine
from dsv4_jax.serving.engine.sizing import plan_sizes
from sharding.mesh import MeshShape, MeshSizes
from sharding.rules import ENGINE
from sharding.shards import SINGLE, Shards
from tests.sharding.support import CFG, PLAIN, Case, shards_of

MAX_LEN, SLOTS, NEW = 512, 2, 8
LENGTHS = (1, 15, 16, 17, 127, 129, 260)  # around windows, rows, units and chunks


def says(shards: Shards, page_tokens: int = 128) -> tuple[list, float]:
    """Tokens and log-probabilities of prompts that share a beginning; programs compiled late.

    Pages are so few that requests lose theirs and come back; prefixes are met again.
    """
    params = Case().params
    if shards.mesh is not None:
        params = jax.device_put(params, shardings(param_specs(CFG, shards), shards))
    scheduling, sizes = plan_sizes(
        CFG, MAX_LEN, SLOTS, cache_tokens=MAX_LEN, page_tokens=page_tokens
    )
    scheduling = replace(scheduling, reserve_tokens=1)
    tier = {"host_cache_bytes": 1 << 24}
    engine = Engine(CFG, PLAIN, params, scheduling, sizes, "test", **tier, shards=shards)
    engine.warm_up()
    engine.start()
    ids = np.random.default_rng(0).integers(3, CFG.vocab_size, max(LENGTHS)).tolist()

    def ask(index: int) -> list:
        greedy = SamplingParams(NEW, temperature=0.0, logprobs=2, prompt_logprobs=1)
        drawn = SamplingParams(NEW, temperature=1.0, top_p=0.9, seed=index, frequency_penalty=0.5)
        prompt = [*ids[: LENGTHS[index // 2]], 3 + index]
        stream = engine.stream(prompt, drawn if index % 2 else greedy, frozenset())
        return [*stream, *(stream.prompt_logprobs or ())]

    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(2 * len(LENGTHS))))
        text = engine.metrics.text().decode()
    finally:
        engine.stop()
    [late] = re.findall(r"^\S*compilations_after_ready_total\S* (\S+)$", text, re.MULTILINE)
    return answers, float(late)


@pytest.mark.slow
def test_an_engine_over_a_mesh_says_the_same():
    wanted, _ = says(SINGLE)
    for mesh, page_tokens in (("expert=2,tensor=4", 128), ("tensor=8", 256)):
        said, late = says(shards_of(mesh, ENGINE), page_tokens)
        assert late == 0
        for got, want in zip(said, wanted, strict=True):
            assert [t and t.id for t in got] == [t and t.id for t in want]
            a, b = ([t.logprob for t in ts if t and t.logprob is not None] for ts in (got, want))
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_weights_are_split_and_the_state_is_not():
    cfg = presets.v4_flash()
    _, sizes = plan_sizes(cfg, 1 << 20, 8)
    shards = Shards(MeshSizes(MeshShape(tensor=8)), ENGINE)
    whole, part = memory(cfg, Numerics(), sizes), memory(cfg, Numerics(), sizes, shards)
    assert part[1:] == whole[1:]
    assert part.weights < 1.1 * whole.weights / 8
