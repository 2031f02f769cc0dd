"""Weights that were decoded once compute what stored ones do."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.decoded import MOST_BYTES, decode_once, decoded_bytes, decodes
from dsv4_jax.numerics import Numerics
from dsv4_jax.presets import PRESETS
from dsv4_jax.quant import DecodedWeight, QuantizedArray, dequantize
from tests.model.support import PLAIN, REFERENCE, Runner, row_cosines
from tests.model.test_logits import FOLDERS, MAX_ABS, MIN_COSINE, stored

CHUNK = 32  # with few prompts: by all experts in decoding, by tiles in front


def held(tree):
    return jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, DecodedWeight | QuantizedArray))


def test_values_are_those_of_the_stored_form(model):
    """Bit for bit, and nothing stays quantised."""
    before, after = held(model.params), held(decode_once(model.params))
    assert any(isinstance(node, QuantizedArray) for node in before)
    for old, new in zip(before, after, strict=True):
        assert not isinstance(new, QuantizedArray)
        values = new.values if isinstance(new, DecodedWeight) else new
        assert np.array_equal(dequantize(old, jnp.float32), values.astype(jnp.float32))


@pytest.mark.parametrize("folder", [pytest.param(f, marks=pytest.mark.slow) for f in FOLDERS])
def test_logits(folder, models, within):
    """Against the official code, without rounding."""
    plain = models(folder)
    model = replace(plain, params=decode_once(plain.params))
    run = Runner(model, PLAIN, model.prompts).run(CHUNK, decode=True)
    for name, part, rows, want in stored(model, "float32"):
        error = np.abs(run.part(name, part)[rows] - want).max()
        within(f"{folder}: decoded weights vs float32, {part}, absolute", error, MAX_ABS)


@pytest.mark.slow
def test_rounded_logits_of_a_few_tokens(model):
    """Prefill and decoding of two short prompts in bfloat16, beside the stored weights."""
    prompts = sorted(model.prompts, key=lambda prompt: len(prompt.ids))[:2]
    once = replace(model, params=decode_once(model.params))
    width = max(len(prompt.tokens) for prompt in prompts)
    got, want = (Runner(m, REFERENCE, prompts).run(width, decode=True) for m in (once, model))
    for prompt in prompts:
        for part in ("prefill", "decode"):
            rows = got.part(prompt.name, part), want.part(prompt.name, part)
            count = len(prompt.tokens) if part == "prefill" else len(prompt.decode)
            assert row_cosines(*(a[:count] for a in rows)).mean() >= MIN_COSINE


def test_when_weights_are_decoded(model):
    """On a CPU, if they are small, unless kernels need the stored form."""
    small, large = model.cfg, PRESETS["v4-flash"]()
    assert decoded_bytes(small) < MOST_BYTES < decoded_bytes(large)
    assert decodes("auto", small, Numerics()) and not decodes("auto", large, Numerics())
    assert decodes("on", large, Numerics()) and not decodes("off", small, Numerics())
    kernels = Numerics(implementation="interpret")
    assert not decodes("auto", small, kernels)
    with pytest.raises(ValueError, match="--decode-weights on"):
        decodes("on", small, kernels)
    with pytest.raises(ValueError, match="--decode-weights maybe"):
        decodes("maybe", small, Numerics())
