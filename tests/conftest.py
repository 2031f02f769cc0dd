"""Settings for every test: eight emulated CPU devices, and shapes that must match exactly."""

import os

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tells workers of pytest-xdist (`-n`) what to run together: a listed folder, or a file."""
    for item in items:
        file = item.nodeid.split("::")[0]
        group = next((folder for folder in TOGETHER if file.startswith(folder)), file)
        item.add_marker(pytest.mark.xdist_group(group))
