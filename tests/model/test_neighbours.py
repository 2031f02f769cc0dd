"""A sequence's numbers are its own, to the bit, whatever else is in the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import model, presets
from dsv4_jax.cache import init_cache
from dsv4_jax.numerics import Numerics

SHORT, LONG, STEPS = 31, 120, 12  # the indexer keeps 16 rows of 4 tokens


def test_decoding_does_not_depend_on_how_long_the_neighbour_is():
    one_layer = presets.tiny().replace(num_layers=1, compress_ratios=(4, 0))  # CSA, then MTP
    cfg, num = one_layer, Numerics("plain", "float32")
    params = model.init_params(cfg, jax.random.key(0))
    prefill = jax.jit(partial(model.prefill, cfg, num))
    decode = jax.jit(partial(model.decode_step, cfg, num))
    tokens_BT = np.random.default_rng(0).integers(3, 300, (2, LONG + STEPS))

    def run(neighbour: int) -> np.ndarray:
        cache = init_cache(cfg, 2, 256, num)
        count_B = jnp.array([SHORT, neighbour])
        _, cache = prefill(params, jnp.asarray(tokens_BT[:, :LONG]), cache, count_B)
        found = []
        for step in range(STEPS):
            out, cache = decode(params, jnp.asarray(tokens_BT[:, SHORT + step]), cache)
            found.append(np.asarray(out.logits[0]))
        return np.stack(found)

    alone = run(SHORT)
    assert (run(LONG) == alone).all()
