"""DeepSeek-V4 in JAX: the model, its state, and what runs it.

Names load on first use, so that parts without arrays (encoding, tokenizer, command-line help) start
without jax. `load_checkpoint` is the one name that comes from another package of this project.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4_jax import presets as presets
    from dsv4_jax.cache import Cache as Cache
    from dsv4_jax.cache import init_cache as init_cache
    from dsv4_jax.config import ModelConfig as ModelConfig
    from dsv4_jax.config import Yarn as Yarn
    from dsv4_jax.generator import Generator as Generator
    from dsv4_jax.model import Output as Output
    from dsv4_jax.model import decode_step as decode_step
    from dsv4_jax.model import draft as draft
    from dsv4_jax.model import forward as forward
    from dsv4_jax.model import init_params as init_params
    from dsv4_jax.model import prefill as prefill
    from dsv4_jax.numerics import Numerics as Numerics
    from dsv4_jax.quant import QuantizedArray as QuantizedArray
    from dsv4_jax.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "Cache": "dsv4_jax.cache",
    "Generator": "dsv4_jax.generator",
    "ModelConfig": "dsv4_jax.config",
    "Numerics": "dsv4_jax.numerics",
    "Output": "dsv4_jax.model",
    "QuantizedArray": "dsv4_jax.quant",
    "SamplingParams": "dsv4_jax.sampling",
    "Yarn": "dsv4_jax.config",
    "decode_step": "dsv4_jax.model",
    "draft": "dsv4_jax.model",
    "forward": "dsv4_jax.model",
    "init_cache": "dsv4_jax.cache",
    "init_params": "dsv4_jax.model",
    "load_checkpoint": "checkpoints.load",
    "prefill": "dsv4_jax.model",
}
__all__ = [*_HOMES, "presets"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("dsv4_jax.presets")
    if name not in _HOMES:
        raise AttributeError(f"module 'dsv4_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
