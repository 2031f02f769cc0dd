"""Tokens find their experts on other devices, forwards and backwards, in every form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv4_jax import exchange
from dsv4_jax.exchange import Tokens
from dsv4_jax.numerics import Numerics
from tests.sharding.support import shards_of

E, A, D, U = 16, 3, 8, 24
NUM = Numerics("plain", "float32", "reference")


def experts(weights_EDD, x_UD, experts_UA, weights_UA, real_U):
    """Differentiable experts: all of them for every token."""
    chosen = jax.nn.one_hot(experts_UA, len(weights_EDD))  # zeros past the end
    chosen = (chosen * weights_UA[..., None]).sum(1) * real_U[:, None]
    every = jnp.einsum("UD,EDF->UEF", x_UD, weights_EDD, precision="highest")
    return jnp.einsum("UE,UEF->UF", chosen, jnp.tanh(every), precision="highest")


def inputs():
    rng = np.random.default_rng(0)
    chosen = np.stack([np.sort(rng.permutation(E)[:A]) for _ in range(U)])
    tokens = Tokens(
        jnp.asarray(rng.normal(size=(U, D)), jnp.float32),
        jnp.asarray(chosen, jnp.int32),
        jnp.asarray(rng.random((U, A)), jnp.float32),
        jnp.asarray(rng.random(U) < 0.8),
    )
    return jnp.asarray(rng.normal(size=(E, D, D)), jnp.float32), tokens


def over(shards, weights, tokens):
    """`exchange` on a mesh; tokens of this test are split like a batch."""

    def run(weights, tokens):
        own = partial(experts, weights)
        return exchange.exchange(tokens, len(weights), own, NUM, shards)

    rows = P(shards.axes("batch"))
    specs = (P(shards.axes("experts")), Tokens(rows, rows, rows, rows))
    mapped = jax.shard_map(run, mesh=shards.mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return mapped(weights, tokens)


def loss(run, weights, x_UD, weights_UA, tokens):
    out_UD = run(weights, tokens._replace(x_UD=x_UD, weights_UA=weights_UA))
    return (out_UD * jnp.cos(jnp.arange(out_UD.size).reshape(out_UD.shape))).sum()


def ragged_all_to_all(operand, output, first, sent, place, came, *, axis_name):
    """What CPUs lack, from a gather of everything."""
    del came
    whole, first, sent, place = (
        jax.lax.all_gather(a, axis_name) for a in (operand, first, sent, place)
    )
    me = jax.lax.axis_index(axis_name)
    for rows, begin, count, at in zip(whole, first[:, me], sent[:, me], place[:, me], strict=True):
        row = jnp.arange(len(rows))
        here = (row >= begin) & (row < begin + count)
        output = output.at[jnp.where(here, at + row - begin, len(output))].set(rows, mode="drop")
    return output


SLOW = pytest.mark.slow
CASES = [
    ("gather", "fsdp=2,expert=2,context=2", 1),
    ("padded", "expert=2,tensor=2", 3),
    ("ragged", "expert=2,tensor=2", 1),
    ("ragged", "fsdp=2,expert=4", 5),
    pytest.param("gather", "expert=4", 1, marks=SLOW),
    pytest.param("gather", "expert=2,tensor=2", 1, marks=SLOW),
    pytest.param("padded", "expert=4", 1, marks=SLOW),
    pytest.param("padded", "fsdp=2,expert=2,context=2", 2, marks=SLOW),
]


@pytest.mark.parametrize(("form", "mesh", "rounds"), CASES)
def test_values_and_gradients_equal_one_device(mesh, form, rounds, monkeypatch):
    shards = shards_of(mesh, exchange=form)
    room = shards.count("experts") * A
    share = U // shards.count("batch") // (shards.count("experts") // shards.count("batch"))
    monkeypatch.setattr(exchange, "MAX_ROWS", -(-room * share // rounds))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    weights, tokens = inputs()
    differentiate = partial(jax.value_and_grad, argnums=(0, 1, 2))

    def single(weights, tokens):
        return experts(weights, *tokens)

    args = (weights, tokens.x_UD, tokens.weights_UA, tokens)
    want = jax.jit(differentiate(partial(loss, single)))(*args)
    got = jax.jit(differentiate(partial(loss, partial(over, shards))))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("mesh", ["context=8", "data=2,context=4"])
def test_a_gather_in_two_stages_keeps_the_order(mesh, monkeypatch):
    monkeypatch.setattr("sharding.shards.WHOLE", 4)
    shards = shards_of(mesh)
    x = jnp.arange(3 * 16 * 2).reshape(3, 16, 2)
    parts = P(None, "context")
    joined = jax.shard_map(
        lambda x: shards.join(x, "context", 1),
        mesh=shards.mesh,
        in_specs=parts,
        out_specs=P(),
        check_vma=False,
    )
    np.testing.assert_array_equal(jax.jit(joined)(x), x)
