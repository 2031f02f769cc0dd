"""Preflight of a training step: the whole step, compiled for a slice that need not exist.

Without compiling: where every parameter and its slots lie, and what follows from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax import placement
from dsv4_jax.config import ModelConfig
from dsv4_jax.parallel import check
from dsv4_jax.preflight import compile as compiler
from dsv4_jax.preflight import slices
from dsv4_jax.preflight.compile import Report
from dsv4_jax.preflight.programs import Program as Compiled
from dsv4_jax.preflight.render import HEAD, cells, columns
from dsv4_jax.training.batch import Batch
from dsv4_jax.training.halo import check_length
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.leaves import places
from dsv4_jax.training.muon import COEFFICIENTS
from dsv4_jax.training.optimizer import OptimizerConfig
from dsv4_jax.training.partition import view
from dsv4_jax.training.placing import named, placed_shapes, row_spec
from dsv4_jax.training.precision import Precision
from dsv4_jax.training.program import Program
from dsv4_jax.training.step import Knobs, TrainState, init_state, make_step
from sharding.mesh import MeshShape, generation, make_mesh, num_chips, shape_of, topology_devices
from sharding.rules import TRAIN
from sharding.shards import Shards

OPTIMIZER = OptimizerConfig(ns_dtype="bfloat16")
PASSES = 3  # forwards once, backwards twice as much; what is computed again is a choice


class TrainSizes(NamedTuple):
    """batch: rows of an optimizer step. length: tokens of a row. micro_rows: rows that a device
    differentiates at once."""

    batch: int
    length: int
    micro_rows: int


def sizes_of(cfg: ModelConfig, batch: int, length: int, micro_rows: int) -> TrainSizes:
    """Checked sizes.

    Raises:
        ValueError: a size out of range.
    """
    if batch < 1 or micro_rows < 1:
        raise ValueError(f"--batch {batch} and --micro-rows {micro_rows} must be positive")
    if not 1 <= length <= cfg.max_len:
        raise ValueError(f"--context {length} must lie between 1 and the model's {cfg.max_len}")
    return TrainSizes(batch, length, micro_rows)


def run(
    name: str,
    cfg: ModelConfig,
    topology: str,
    sizes: TrainSizes,
    mesh: MeshShape,
    exchange: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    cache: Path | None = None,
) -> Report:
    """Compiles a step of the sparse phase for `topology` and reports.

    bfloat16 activations and products, float32 weights and slots, layers in a scan and recomputed in
    the backward pass, Muon in bfloat16. cache: see `compile.measure_program`.

    Raises:
        ValueError: unknown topology, or a mesh or sizes that do not fit it or do not divide.
    """
    kind, devices = generation(topology), topology_devices(topology)
    cfg = master(cfg)
    shards = Shards(make_mesh(mesh, devices), TRAIN, exchange=exchange, split=True)
    micro = check_fit(cfg, shards, sizes)
    program = Program(cfg, Precision("bfloat16"), remat="group", shards=shards)
    state = state_of(program)
    weights, slots = (local_bytes(part) for part in (state.params, state.opt_state))
    report = Report(
        name,
        topology,
        num_chips(topology),
        str(mesh),
        "train",
        sizes.batch,
        sizes.length,
        sizes.length,
        slices.CHIPS[kind].hbm_bytes,
        weights,
        slots,
        floor=floor_of(cfg, kind, mesh, sizes, weights + slots),
    )
    if report.used > report.hbm_bytes:
        report.reason = "weights and slots alone exceed the memory of a device"
        return report
    say(f"compiling for {len(devices)} devices, {micro} microbatches")
    compiler.measure_program(report, _step(program, state, sizes, micro), shards, kind, cache)
    return report


def master(cfg: ModelConfig) -> ModelConfig:
    """Nothing is quantised in the weights that learn."""
    return cfg.replace(dense_format=None, expert_format=None)


def floor_of(
    cfg: ModelConfig, kind: str, mesh: MeshShape, sizes: TrainSizes, state: int
) -> dict[str, float]:
    """Seconds that a step needs at least. state: bytes of weights and slots on a device, which are
    read and written once."""
    chip, tokens = slices.CHIPS[kind], sizes.batch * sizes.length
    work = PASSES * tokens * slices.token_flops(cfg, sizes.length // 2) + muon_flops(cfg)
    return {"compute": work / mesh.num_devices / chip.flops, "HBM": 2 * state / chip.hbm_rate}


def check_fit(cfg: ModelConfig, shards: Shards, sizes: TrainSizes) -> int:
    """The number of microbatches; needs no devices.

    Raises:
        ValueError: the model or the sizes do not divide over the mesh.
    """
    check(cfg, shards, sizes.batch)
    check_length(cfg, shards, sizes.length)
    return microbatches(sizes, shards.count("batch"))


def microbatches(sizes: TrainSizes, parts: int) -> int:
    """Into how many a batch is cut on `parts` devices that share it.

    Raises:
        ValueError: it does not divide.
    """
    at_once = parts * sizes.micro_rows
    if sizes.batch % at_once:
        raise ValueError(
            f"a batch of {sizes.batch} rows does not divide into microbatches of {at_once} "
            f"({parts} devices × {sizes.micro_rows} rows)"
        )
    return sizes.batch // at_once


def state_shapes(program: Program) -> TrainState:
    """Shapes of parameters and slots."""

    def make() -> TrainState:
        params = init_params(program.cfg, InitConfig(), jax.random.key(0))
        return init_state(program, OPTIMIZER, params)

    return jax.eval_shape(make)


def state_of(program: Program) -> TrainState:
    """The same with their placement."""
    return placed_shapes(program.cfg, state_shapes(program), program.shards, scan=True)


class StateRow(NamedTuple):
    """A parameter of a run, and what the optimizer keeps beside it on each device."""

    weight: placement.Row
    slots: tuple[str, ...]
    slot_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All fields in one level."""
        row = self.weight._asdict() | {"placement": list(self.weight.placement)}
        return row | {"slots": list(self.slots), "slot_bytes": self.slot_bytes}


def explain(cfg: ModelConfig, shards: Shards) -> Iterator[StateRow]:
    """Every parameter in training with its slots, which lie where it does; needs no devices."""
    cfg = master(cfg)
    state = state_shapes(Program(cfg))
    params = jax.tree_util.tree_leaves_with_path(state.params)
    slots = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found: dict[Any, list[tuple[str, Any]]] = {path: [] for path, _ in params}
    for path, slot in slots:
        if end := next((path[n:] for n in range(len(path)) if path[n:] in found), None):
            name = path[-len(end) - 1].name  # of the field that holds a tree like the parameters
            found[end].append((name, slot))
    for (path, leaf), row in zip(params, placement.explain(cfg, shards), strict=True):
        assert leaf.shape == row.shape, row.name
        width = leaf.dtype.itemsize
        here = math.prod(shards.local_shape(row.placement, leaf.shape))
        row = row._replace(
            dtype=str(leaf.dtype), device_bytes=here * width, total_bytes=leaf.size * width
        )
        beside = sum(here * slot.dtype.itemsize for _, slot in found[path])
        yield StateRow(row, tuple(name for name, _ in found[path]), beside)


def placements(rows: list[StateRow]) -> str:
    """A table of `explain`."""
    lines = [(*cells(r.weight), "+".join(r.slots), f"{r.slot_bytes / 2**20:,.3f}") for r in rows]
    head = (*HEAD, "slots", "slots MiB/device")
    weights, slots = state_bytes(rows)
    return (
        f"{columns([head, *lines])}\n{weights / 2**30:.3f} GiB of weights and "
        f"{slots / 2**30:.3f} GiB of slots on each device"
    )


def state_bytes(rows: list[StateRow]) -> tuple[int, int]:
    """Of one device: weights, and slots."""
    return sum(row.weight.device_bytes for row in rows), sum(row.slot_bytes for row in rows)


def estimate(cfg: ModelConfig, topology: str, shards: Shards, sizes: TrainSizes) -> dict[str, Any]:
    """What sizes alone tell of a step: bytes of one device and seconds by resource."""
    kind = generation(topology)
    assert shards.mesh is not None
    mesh, (weights, slots) = shape_of(shards.mesh), state_bytes(list(explain(cfg, shards)))
    return {
        "mesh": str(mesh),
        "fits": weights + slots <= slices.HEADROOM * slices.CHIPS[kind].hbm_bytes,
        "weights": weights,
        "slots": slots,
        "floor": floor_of(master(cfg), kind, mesh, sizes, weights + slots),
    }


def estimated(found: dict[str, Any]) -> str:
    """`estimate` in lines."""
    floor, gib = found["floor"], 2**30
    return (
        f"mesh {found['mesh']}: {found['weights'] / gib:.2f} GiB of weights and "
        f"{found['slots'] / gib:.2f} GiB of slots on each device, which "
        f"{'fit' if found['fits'] else 'do NOT fit'}\n"
        f"floor ms: compute {1e3 * floor['compute']:.3f}, HBM {1e3 * floor['HBM']:.3f}\n"
        "temporaries, often most of the memory, and messages are known to the compiler alone"
    )


def _step(program: Program, state: TrainState, sizes: TrainSizes, micro: int) -> Compiled:
    rows = named(program.shards, row_spec(program.shards))
    shape = (micro, sizes.batch // micro, sizes.length)
    field = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    knobs = Knobs(*[number] * len(Knobs._fields))  # type: ignore[arg-type]
    step = make_step(program, OPTIMIZER, "all")

    def run(params: Any, slots: Any, batch: Batch, knobs: Knobs) -> Any:
        return step(TrainState(params, slots), batch, knobs)

    batch = Batch(field, field, field, field)  # type: ignore[arg-type]
    return Compiled(run, state.params, state.opt_state, (batch, knobs), (0, 1))


def local_bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def muon_flops(cfg: ModelConfig) -> float:
    """Of one orthogonalisation of every matrix."""
    total = 0.0
    for place in places(cfg, scan=False):
        how, shape = view(place, cfg), place.spec.shape
        if how.group == "muon":
            stack = math.prod(shape[:-2]) * how.groups
            total += stack * sum(map(partial(_iteration, shape[-1]), how.rows))
    return total * len(COEFFICIENTS)


def _iteration(width: int, rows: int) -> float:
    r, q = sorted((rows, width))
    return 4.0 * r * r * q + 2.0 * r**3
