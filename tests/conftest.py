"""Settings for every test: eight emulated CPU devices, and shapes that must match exactly."""

import os

import jax

# These must be set before anything asks JAX for a device.
PLATFORM = os.environ.get("DSV4_TEST_PLATFORM", "cpu")  # "tpu" together with: pytest -m tpu
jax.config.update("jax_platforms", PLATFORM)
if PLATFORM == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
