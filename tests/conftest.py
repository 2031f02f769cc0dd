"""Settings for every test: eight emulated CPU devices, and shapes that must match exactly."""

import os
from typing import Any

import jax
import pytest

# These must be set before anything asks JAX for a device.
PLATFORM = os.environ.get("DSV4_TEST_PLATFORM", "cpu")  # "tpu" together with: pytest -m tpu
jax.config.update("jax_platforms", PLATFORM)
if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Folders whose tests share compiled programs: one worker runs all of them.
TOGETHER = ("tests/model/", "tests/serving/engine/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tells pytest-xdist (`-n`) what one worker runs: a listed folder, or a file."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return Together(config, log)
