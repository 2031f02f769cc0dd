"""Conversion: values, formats, refusals, resuming; every failure leaves nothing taken for whole."""

import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from checkpoints import convert as convert_module
from checkpoints import files, store
from checkpoints.convert import convert
from checkpoints.errors import CheckpointError
from checkpoints.export import export
from checkpoints.manifest import load_config, read_manifest
from checkpoints.progress import Progress
from dsv4_jax.params import unit_specs
from tests.checkpoints.support import (
    BASE,
    DATA,
    INSTRUCT,
    read_raw,
    tensor_files,
    values,
    write_raw,
)


def leaf_bytes(root):
    """Every stored array of a checkpoint as bytes."""
    cfg = load_config(root)
    return {
        (unit, leaf): array.tobytes()
        for unit in unit_specs(cfg)
        for leaf, array in store.load_unit_numpy(root, unit, cfg).items()
    }


@pytest.mark.parametrize("file, source", [("weights_digest", INSTRUCT), ("base_weights_digest", BASE)])
def test_digests_of_the_source(file, source):
    check_digests(json.loads((DATA / f"{file}.json").read_text()), read_raw(source))


def check_digests(digests, raw):
    for name, wanted in digests.items():
        array = values(raw, name)
        flat = array.reshape(-1)
        index = np.arange(flat.size)
        assert list(array.shape) == wanted["shape"]
        assert raw.tensors[name].dtype.name == wanted["stored"]
        mix = (flat * ((7919 * index % 101) - 50)).sum()
        tolerance = 1e-6 * wanted["abs_sum"] + 1e-12
        assert abs(flat.sum() - wanted["sum"]) <= tolerance, name
        assert abs(np.abs(flat).sum() - wanted["abs_sum"]) <= tolerance, name
        assert abs(mix - wanted["mix"]) <= 50 * tolerance, name
        for position, value in wanted["probe"].items():
            assert flat[int(position)] == value, (name, position)
