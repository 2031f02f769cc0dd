"""Held-out loss by hand: nats, bits per byte, by position and by document length."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.training.evaluate import evaluate
from tests.training.support import documents, pack


def test_losses_by_position_and_length():
    """Two documents of 6 and 3 tokens in one row; the loss of token t + 1 is t + 1 nats."""
    batch = pack([documents([6, 3])], 12)
    batch = batch._replace(learn_BT=batch.learn_BT.at[0, 1].set(0))  # one target is not learnt

    def score(_params, batch):
        place = np.asarray(batch.position_BT, np.float32)
        return {"loss": place + 1, "mtp": 2 * place, "agrees": place > 0}

    found = evaluate(score, None, iter([batch, batch]))
    first, second = [2, 3, 4, 5], [1, 2]  # of the long document and of the short one
    assert found["targets"] == 2 * 6
    assert found["loss"] == pytest.approx(np.mean(first + second))
    assert found["mtp"] == pytest.approx(np.mean([0, 2, 4, 6, 0]))
    assert found["agrees"] == pytest.approx(3 / 5)
    by_seen = {"position 1-1": 1, "position 2-3": (2 + 2 + 3) / 3, "position 4-7": (4 + 5) / 2}
    by_length = {"length 2-3": np.mean(second), "length 4-7": np.mean(first)}
    for name, value in (by_seen | by_length).items():
        assert found[name] == pytest.approx(value), name
    assert len(found) == 3 + 3 + 2 + 1


def test_bits_per_byte_count_the_bytes_of_targets():
    batch = pack([documents([5])], 6)
    sizes = np.arange(61) % 4  # bytes of every id
    found = evaluate(
        lambda _, b: {"loss": np.full(b.tokens_BT.shape, 2.0)}, None, iter([batch]), sizes
    )
    num_bytes = sizes[np.asarray(batch.tokens_BT)[0, 1:5]].sum()
    assert found["bits_per_byte"] == pytest.approx(4 * 2.0 / math.log(2) / num_bytes)
    assert jnp.float32(found["loss"]) == 2
