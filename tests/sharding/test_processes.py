"""Several processes compute what one computes."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from sharding.shards import SINGLE
from tests.sharding.support import Case, worst

TIMEOUT_S = 600


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def single():
    return Case().run(SINGLE, mtp=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_equal_one(count, single, tmp_path):
    target, address = tmp_path / "logits.npz", f"localhost:{free_port()}"
    command = [sys.executable, "-m", "tests.sharding.process", address, str(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, str(index), str(target)], env=environment)
        for index in range(count)
    ]
    try:
        assert [process.wait(TIMEOUT_S) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    with np.load(target) as found:
        for name, want in zip(found.files, single, strict=True):
            assert worst(found[name], want) <= 1e-5
