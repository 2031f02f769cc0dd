"""Every dequantised tensor of the fixtures against its published digest, before and after."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import store
from checkpoints.hf_reader import open_checkpoint
from checkpoints.names import flatten, official_tensors
from checkpoints.transforms import to_float32
from tests.checkpoints.support import DATA, check_digest

CASES = [
    ("weights_digest", "instruct", 0.0),
    ("weights_digest", "bf16", 0.0),
    ("weights_digest", "fp8", 0.0),
    ("base_weights_digest", "base", 1e-7),  # float32 scales: products round in float32
    ("base_weights_digest", "single", 1e-7),
]


def digests(file):
    return json.loads((DATA / f"{file}.json").read_text())


@pytest.mark.parametrize("file, variant, rtol", CASES)
def test_reader_values(variants, file, variant, rtol):
    reader = open_checkpoint(variants[variant])
    for name, wanted in digests(file).items():
        array = reader.view(name)
        scale = name.removesuffix("weight") + "scale"
        if scale in reader.tensors:
            codes = array.view(np.uint8) if array.dtype == np.int8 else array
            array = to_float32(codes, reader.view(scale))
        check_digest(name, array.astype(np.float64), wanted, max(rtol, 1e-12))


@pytest.mark.parametrize("file, variant, rtol", CASES)
def test_loaded_values(converted, file, variant, rtol):
    cfg = store.load_config(converted[variant])
    wanted = digests(file)
    dense = cfg.replace(dense_format=None, expert_format=None)
    entries = {e.name: e for e in official_tensors(dense, mtp_copies=True)}
    assert wanted.keys() <= entries.keys()
    for unit, tree in store.load_units(converted[variant], cfg):
        flat = flatten(store.densify(tree, jnp.float32))
        for name, digest in wanted.items():
            entry = entries[name]
            if entry.unit == unit:
                leaf = flat[entry.leaf] if entry.expert is None else flat[entry.leaf][entry.expert]
                check_digest(name, np.asarray(leaf, np.float64), digest, max(rtol, 1e-12))


def test_the_digests_cover_every_weight(variants):
    for file, variant, _ in (CASES[0], CASES[3]):
        names = {n for n in open_checkpoint(variants[variant]).tensors if not n.endswith(".scale")}
        copies = {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"}
        assert names - copies == digests(file).keys() - copies
