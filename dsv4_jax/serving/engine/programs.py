"""The jitted programs: a closed set of shapes over one donated state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv4_jax import model
from dsv4_jax.config import ModelConfig
from dsv4_jax.numerics import Numerics
from dsv4_jax.serving.engine import device, steps
from dsv4_jax.serving.engine.device import Sizes, State
from sharding.shards import SINGLE, Shards


def _light(program: Callable[..., Any]) -> Callable[..., Any]:
    """The program of a step without the checkpoints: what it does not touch costs time per call."""

    def run(params: model.Params, state: State, *rest: Any) -> Any:
        changed, *results = program(params, dataclasses.replace(state, checkpoints=[]), *rest)
        return dataclasses.replace(changed, checkpoints=state.checkpoints), *results

    return run


class Programs:
    """The jitted programs of one model and one set of sizes.

    Over a mesh every device holds the whole state and sees all rows; only weights are split.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        num: Numerics,
        params: model.Params,
        sizes: Sizes,
        shards: Shards = SINGLE,
    ) -> None:
        self.sizes = sizes
        self.vocab_size = cfg.vocab_size
        self.params = params
        # Results of programs are bound to where they lie. A state that is not would be another
        # signature, and the first program of the warm-up be compiled again for the first request.
        # Host arrays are not bound to a single device, whether they are put there or not.
        self._home: Any = next(iter(jax.tree.leaves(params)[0].devices()))
        if isinstance(shards.mesh, Mesh):
            self._home = NamedSharding(shards.mesh, PartitionSpec())
        self._init = self._jit(
            partial(device.init_state, cfg, num, sizes, model.is_scanned(cfg, params))
        )
        self.decode = _light(self._jit(partial(steps.decode, cfg, num, shards), 1))
        verify = partial(steps.decode, cfg, num, shards, num_guesses=sizes.guesses)
        self.verify = _light(self._jit(verify, 1))
        burst = partial(steps.burst, cfg, num, shards, num_steps=sizes.burst)
        self.burst = _light(self._jit(burst, 1))
        self.prefill = _light(self._jit(partial(steps.prefill, cfg, num, shards), 1))
        self.start_slot = self._jit(device.start_slot, 0)
        self.set_uses = self._jit(device.set_uses, 0)
        self.copy_pages = self._jit(device.copy_pages, 0)
        self.read_pages = self._jit(device.read_pages)
        self.write_pages = self._jit(device.write_pages, 0)
        self.read_slot = self._jit(device.read_slot)
        self.write_slot = self._jit(device.write_slot, 0)
        self.read_checkpoint = self._jit(device.read_checkpoint)
        self.write_checkpoint = self._jit(device.write_checkpoint, 0)
        self.save_rings = self._jit(device.save_rings, 0)
        self.load_rings = self._jit(device.load_rings, 0)

    def init(self) -> State:
        """The empty state, where the programs keep it."""
        return jax.device_put(self._init(), self._home)

    def _jit(self, fn: Callable[..., Any], *donated: int) -> Callable[..., Any]:
        if not isinstance(self._home, NamedSharding):
            return jax.jit(fn, donate_argnums=donated)
        program = jax.jit(fn, donate_argnums=donated, out_shardings=self._home)

        def run(*args: Any) -> Any:
            """Host arrays are placed first: else they would be another signature."""
            return program(*jax.tree.map(lambda a: a if _is_placed(a) else self.put(a), args))

        return run

    def put(self, tree: Any) -> Any:
        """Host arrays where the programs want them; of several processes, each brings the same."""
        where = self._home
        if not isinstance(where, NamedSharding):
            return jax.device_put(tree)
        if where.is_fully_addressable:
            return jax.device_put(tree, where)

        def everywhere(a: Any) -> Array:
            values = np.asarray(a)
            return jax.make_array_from_callback(values.shape, where, lambda at: values[at])

        return jax.tree.map(lambda a: a if _is_placed(a) else everywhere(a), tree)

    def tie(self, owner: Any, tree: Any) -> None:
        """What was read, `tree`, is needed as long as `owner` lives: see `mirror.Mirror`."""


def _is_placed(a: Any) -> bool:
    return isinstance(a, jax.Array)
