"""GRPO and distillation through the model: against plain sums, on packed rows, with teachers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training.batch import Batch, Rollout
from dsv4_jax.training.distill import Distill, Teacher
from dsv4_jax.training.forward import forward
from dsv4_jax.training.grpo import Grpo
from dsv4_jax.training.losses import Weights, count, objective
from dsv4_jax.training.placing import make_shards, named, row_spec, state_shardings
from dsv4_jax.training.program import Program
from dsv4_jax.training.step import gradients
from tests.sharding.support import Compiled, placed
from tests.training.support import CONFIG, documents, pack, random_params

SMALL = CONFIG.replace(num_layers=2, compress_ratios=(4, 8, 0))
ONE = CONFIG.replace(num_layers=1, compress_ratios=(4,), num_hash_layers=0, num_mtp_layers=0)
WEIGHTS = Weights(0.3, 0.0, 0.0)
TWO = (Teacher("a", 0.5), Teacher("b", 2.0))


def rows_of(seed=0, length=18) -> Batch:
    """Two rows of documents whose last tokens were drawn; teachers 0, 1, all, 0."""
    batch = pack([documents([9, 7], seed), documents([10, 3], seed + 1)], length)
    rng = np.random.default_rng(seed)
    learn = (np.asarray(batch.position_BT) >= 2) & (np.asarray(batch.segment_BT) > 0)
    shape, segment = learn.shape, np.asarray(batch.segment_BT)
    worth = np.array([[0, 0.7, -0.4], [0, -1.2, 0.9]], np.float32)
    taught = np.array([[-1, 0, 1], [-1, -1, 0]], np.int32)
    rollout = Rollout(
        jnp.asarray(-rng.uniform(2, 6, shape) * learn, jnp.float32),
        jnp.asarray(np.take_along_axis(worth, segment, 1)),
        jnp.asarray(np.take_along_axis(taught, segment, 1)),
    )
    return batch._replace(learn_BT=jnp.asarray(learn, jnp.int32), rollout=rollout)


def log_probs(params, batch):
    """Log-probabilities of the whole vocabulary `[B, T, V]`, by the plain forward pass."""
    alone = Program(ONE, index_loss=False, mtp=False)
    y_BTD = forward(alone, params, batch._replace(rollout=None)).y_BTD
    return jax.nn.log_softmax(y_BTD @ params["top"]["head"].T)


def drawn_log_probs(params, batch):
    target_BT = jnp.pad(batch.tokens_BT[:, 1:], ((0, 0), (0, 1)))
    return jnp.take_along_axis(log_probs(params, batch), target_BT[..., None], 2)[..., 0]


def by_document(batch):
    """(tokens with a drawn one behind them, row, document) of every sequence."""
    learn, segment = np.asarray(batch.learn_BT), np.asarray(batch.segment_BT)
    for row in range(len(segment)):
        for number in range(1, segment[row].max() + 1):
            drawn = np.flatnonzero((segment[row] == number) & (learn[row] == 1))
            if len(drawn := drawn[drawn > 0]):
                yield drawn - 1, row


def plain_grpo(params, batch, config, reference):
    """The formula, sequence by sequence."""
    log_p, log_ref = drawn_log_probs(params, batch), drawn_log_probs(reference, batch)
    old = jnp.pad(batch.rollout.old_BT[:, 1:], ((0, 0), (0, 1)))
    found = []
    for at, row in by_document(batch):
        p, q, before = (x[row, at] for x in (log_p, log_ref, old))
        worth = float(np.asarray(batch.rollout.advantage_BT)[row, at[0]])
        rho, u = jnp.exp(p - before), jnp.exp(q - p)
        kept = jnp.clip(rho, 1 - config.clip, 1 + config.clip)
        gain = jnp.minimum(rho * worth, kept * worth)
        if worth < 0:
            gain = jnp.where((before - p).mean() > config.mask_above, 0.0, gain)
        found.append(-(gain - config.kl * rho * (u - jnp.log(u) - 1)).mean())
    return sum(found) / len(found)


def plain_distillation(params, batch, teachers, config):
    log_p = log_probs(params, batch)
    found = []
    for at, row in by_document(batch):
        total = 0.0
        for number, (teacher, other) in enumerate(zip(config.teachers, teachers, strict=True)):
            p, q = log_p[row, at], log_probs(other, batch)[row, at]
            wanted = -1
            if batch.rollout is not None:
                wanted = int(np.asarray(batch.rollout.teacher_BT)[row, at[0]])
            if wanted in (-1, number):
                total += teacher.weight * (jnp.exp(p) * (p - q)).sum(-1).mean()
        found.append(total)
    return sum(found) / len(found)


def floats(tree):
    return [a for a in jax.tree.leaves(tree) if a.dtype == jnp.float32]


def found_by(program, params, batch, others):
    """Loss, metrics and gradient of the trainer's objective, without an indexer's or MTP loss."""

    def loss(params):
        counts = count(batch, by_sequence=True)
        return objective(program, Weights(0, 0, 0), counts, params, batch, None, others)

    (value, aux), g = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))(params)
    return value, aux.metrics, g


def differentiated(loss, params):
    return jax.jit(jax.value_and_grad(loss, allow_int=True))(params)


def same_gradients(found, wanted, loose=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if a.dtype == jnp.float32:
            a, b = np.asarray(a), np.asarray(b)
            np.testing.assert_allclose(a, b, rtol=0, atol=loose * np.abs(b).max() + 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("mask_above", [np.inf, 1e-6])
def test_grpo_of_packed_rows_equals_the_formula(mask_above):
    config = Grpo(clip=0.3, kl=0.2, mask_above=mask_above)
    params, reference, batch = random_params(ONE), random_params(ONE, 1), rows_of()
    program = Program(ONE, index_loss=False, mtp=False, objective=config)
    value, metrics, g = found_by(program, params, batch, [reference])
    expected, wanted = differentiated(lambda p: plain_grpo(p, batch, config, reference), params)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-4)
    assert float(metrics.kl) > 0 and (float(metrics.masked) > 0) is (mask_above < 1)
    same_gradients(g, wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_distillation_from_two_teachers_equals_the_formula(named):
    config, batch = Distill(TWO), rows_of()
    if not named:
        batch = batch._replace(rollout=None)
    params, teachers = random_params(ONE), [random_params(ONE, seed) for seed in (1, 2)]
    program = Program(ONE, index_loss=False, mtp=False, objective=config)
    value, _, g = found_by(program, params, batch, teachers)
    expected, wanted = differentiated(
        lambda p: plain_distillation(p, batch, teachers, config), params
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    same_gradients(g, wanted, 1e-4)


@pytest.mark.slow
def test_the_mtp_block_learns_by_itself():
    """Its loss moves its own weights; everything else has the gradient it has without it."""
    params, batch = random_params(SMALL), rows_of()
    program = Program(SMALL, index_loss=False, objective=Grpo(kl=0.0))
    batch = jax.tree.map(lambda a: a[None], batch)

    def run(mtp):
        program_ = dataclasses.replace(program, mtp=mtp)
        return jax.jit(lambda p, b: gradients(program_, WEIGHTS, p, b))(params, batch)[0]

    alone, both = run(False), run(True)
    for part in ("top", "groups"):
        same_gradients(both[part], alone[part], 1e-6)
    assert all(np.abs(g).max() > 0 for g in floats(both["mtp"][0]["attn"]))


@pytest.mark.slow
def test_microbatches_change_only_rounding():
    params, reference = random_params(ONE), random_params(ONE, 1)
    program = Program(ONE, mtp=False, objective=Grpo(kl=0.2, clip=0.3))
    batch = rows_of()
    run = jax.jit(lambda p, b, o: gradients(program, WEIGHTS, p, b, None, o))
    whole, cut = (
        run(params, jax.tree.map(lambda a, n=n: a.reshape(n, -1, 18), batch), [reference])
        for n in (1, 2)
    )
    np.testing.assert_allclose(whole[1].metrics, cut[1].metrics, rtol=1e-5, atol=1e-7)
    same_gradients(cut[0], whole[0], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,expert=2", "fsdp=2,expert=2,context=2"])
@pytest.mark.parametrize("config", [Grpo(clip=0.3, kl=0.2, mask_above=1.0), Distill(TWO)])
def test_meshes_equal_one_device(config, mesh):
    """Documents cross the border of a row split in two, and so do sums over them."""
    params, others = random_params(ONE), [random_params(ONE, seed) for seed in (1, 2)]
    others = others[: len(config.teachers) if isinstance(config, Distill) else 1]
    rows = [rows_of(seed, 16) for seed in range(4)]
    batch = jax.tree.map(lambda *a: jnp.concatenate(a)[None], *rows)
    program = Program(ONE, mtp=False, index_loss=False, objective=config)
    wanted, expected = Compiled(lambda *a: gradients(program, WEIGHTS, *a))(
        params, batch, None, others
    )
    shards = make_shards(mesh)
    split = dataclasses.replace(program, shards=shards)
    where = state_shardings(ONE, params, shards, scan=True)
    batch = placed(batch, jax.tree.map(lambda _: named(shards, row_spec(shards)), batch))
    g, found = Compiled(lambda *a: gradients(split, WEIGHTS, *a))(
        placed(params, where), batch, None, [placed(other, where) for other in others]
    )
    np.testing.assert_allclose(found.metrics, expected.metrics, rtol=1e-5, atol=1e-7)
    same_gradients(g, wanted, 1e-4)


def test_sequences_are_documents_with_something_drawn():
    batch = rows_of()
    assert float(count(batch, by_sequence=True).sequences) == 4
    learn = batch.learn_BT.at[0, :9].set(0)
    assert float(count(batch._replace(learn_BT=learn), by_sequence=True).sequences) == 3
    assert float(count(batch).sequences) == 0


def test_contradictions():
    with pytest.raises(ValueError, match="index_only"):
        Program(SMALL, index_only=True, mtp=False, sparse=False, objective=Grpo())
    with pytest.raises(ValueError, match="at least one"):
        Distill(())
    with pytest.raises(ValueError, match="teacher x: weight=0"):
        Distill((Teacher("x", 0),))
