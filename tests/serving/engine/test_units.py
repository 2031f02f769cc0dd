import pytest

from dsv4_jax.serving.engine.units import KEY_BYTES, UNIT, UnitChain
from tests.serving.engine.harness import prompt


def keys(tokens, fingerprint="model", tenant="a"):
    chain = UnitChain(fingerprint, tenant)
    chain.extend(tokens)
    return chain.keys


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 255, 256, 257, 1000])
def test_only_complete_units_have_keys(length):
    assert len(keys(prompt(length))) == length // UNIT
    assert all(len(key) == KEY_BYTES for key in keys(prompt(length)))


def test_a_chain_grown_in_steps_equals_one_made_at_once():
    chain, tokens = UnitChain("model", "a"), prompt(700)
    for length in (1, 128, 130, 400, 700, 700):
        chain.extend(tokens[:length])
    assert chain.keys == keys(tokens)


def test_a_key_depends_on_everything_in_front():
    tokens = prompt(512)
    for position in (0, 127, 128, 300):
        changed = list(tokens)
        changed[position] += 1
        same = position // UNIT
        assert keys(changed)[:same] == keys(tokens)[:same]
        assert not set(keys(changed)[same:]) & set(keys(tokens))


@pytest.mark.parametrize(
    ("fingerprint", "tenant"), [("model", "b"), ("other", "a"), ("modela", ""), ("", "modela")]
)
def test_models_and_tenants_do_not_share_keys(fingerprint, tenant):
    assert not set(keys(prompt(256), fingerprint, tenant)) & set(keys(prompt(256)))
