"""Weights decoded once, for CPUs: decoding them in every step takes longer there than the rest.

On a TPU the kernels decode what they multiply with, and what is stored is what is read.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params, init_params
from dsv4_jax.numerics import Numerics
from dsv4_jax.params import is_spec, unit_specs
from dsv4_jax.quant import DecodedWeight, QuantizedArray, dequantize
from sharding.shards import SINGLE, Shards

MODES = ("auto", "on", "off")
MOST_BYTES = 1 << 30  # that decoded weights may take by default
FLOAT32_BYTES = 4
IN_FLOAT32 = ("head", "wkv", "wgate")  # stored narrow, multiplied in float32


def decoded_bytes(cfg: ModelConfig) -> int:
    """Bytes of what `decode_once` makes of a model's quantised weights."""
    specs = jax.tree.leaves(unit_specs(cfg), is_leaf=is_spec)
    return FLOAT32_BYTES * sum(math.prod(s.shape) for s in specs if s.fmt(cfg) is not None)


def weight_bytes(cfg: ModelConfig) -> int:
    """Bytes of all parameters behind `decode_once`."""
    params = jax.eval_shape(lambda: decode_once(init_params(cfg, jax.random.key(0))))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(params))


def decodes(mode: str, cfg: ModelConfig, num: Numerics, shards: Shards = SINGLE) -> bool:
    """Whether to: `on`, `off`, or as `auto` on one CPU device and in little memory.

    Raises:
        ValueError: an unknown mode, or `on` where kernels or a mesh need the stored form.
    """
    if mode not in MODES:
        raise ValueError(f"--decode-weights {mode} must be one of {MODES}")
    possible = num.kernels is None and shards.mesh is None
    if mode == "on" and not possible:
        raise ValueError("--decode-weights on: kernels and meshes need weights as they are stored")
    is_small = jax.default_backend() == "cpu" and decoded_bytes(cfg) <= MOST_BYTES
    return mode == "on" or (mode == "auto" and possible and is_small)


def decode_once(params: Params) -> Params:
    """The same parameters with float32 values in place of codes and scales.

    What is multiplied in float32 anyway becomes float32 as well. Values are the same.
    """
    decode = jax.jit(lambda weight: dequantize(weight, jnp.float32))

    def one(path: Any, node: Any) -> Any:
        if isinstance(node, QuantizedArray):
            return DecodedWeight(decode(node))
        names = [getattr(key, "key", None) for key in path]
        widens = names[-1] in IN_FLOAT32 and ("compressor" in names or names[-1] == "head")
        return node.astype(jnp.float32) if widens else node

    def is_quantised(node: Any) -> bool:
        return isinstance(node, QuantizedArray)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantised)


def decoded_if_small(cfg: ModelConfig, num: Numerics, params: Params) -> Params:
    """Parameters as a server of one device uses them unless told otherwise."""
    return decode_once(params) if decodes("auto", cfg, num) else params
