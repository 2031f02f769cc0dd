"""What scripts/preflight.py calls: arguments to answers."""

from __future__ import annotations

import json
from pathlib import Path

from dsv4_jax.config import ModelConfig
from dsv4_jax.preflight import slices
from dsv4_jax.preflight.compile import Report
from dsv4_jax.preflight.compile import run as compile_one
from dsv4_jax.preflight.programs import Sizes, rules_of
from dsv4_jax.preflight.render import page, placements, text
from dsv4_jax.presets import PRESETS
from sharding.mesh import MeshShape, MeshSizes, generation
from sharding.shards import Shards

__all__ = [
    "advice",
    "check_size",
    "compile_one",
    "estimates",
    "explain",
    "mesh_shape",
    "model_config",
    "page",
    "sizes_of",
    "text",
]


def model_config(name: str) -> ModelConfig:
    """A preset by name, or an official `config.json`.

    Raises:
        ValueError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--model {name}: no such file, and none of {', '.join(PRESETS)}")
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"--model {name} is no JSON: {error}") from error


def sizes_of(cfg: ModelConfig, program: str, batch: int, context: int, chunk: int) -> Sizes:
    """Checked sizes.

    Raises:
        ValueError: unknown program, or a size out of range.
    """
    rules_of(program)
    if batch < 1:
        raise ValueError(f"--batch {batch} must be positive")
    if not 1 <= context <= cfg.max_len:
        raise ValueError(f"--context {context} must lie between 1 and the model's {cfg.max_len}")
    if program != "decode" and not 1 <= chunk <= context:
        raise ValueError(f"--chunk {chunk} must lie between 1 and the context of {context}")
    return Sizes(batch, context, chunk)


def mesh_shape(mesh: str | None) -> MeshShape | None:
    return None if mesh is None else MeshShape.parse(mesh)


def explain(
    cfg: ModelConfig,
    topology: str,
    program: str,
    sizes: Sizes,
    mesh: MeshShape | None,
    as_json: bool,
) -> str:
    """Where every parameter lies, as a table or as JSON."""
    from dsv4_jax import placement

    mesh = mesh or _ranked(cfg, topology, program, sizes)[0].mesh
    check_size(mesh, topology)
    shards = Shards(MeshSizes(mesh), rules_of(program))
    if not as_json:
        return f"{topology}, mesh {mesh}\n{placements(cfg, shards)}"
    rows = [row._asdict() for row in placement.explain(cfg, shards)]
    return json.dumps([row | {"placement": list(row["placement"])} for row in rows])


def estimates(
    cfg: ModelConfig,
    topology: str,
    program: str,
    sizes: Sizes,
    mesh: MeshShape | None,
    as_json: bool,
) -> str:
    """A few meshes of a slice, the best first, and the smallest slice that holds the program."""
    kind = generation(topology)
    if mesh:
        check_size(mesh, topology)
        found = [slices.estimate(cfg, kind, mesh, program, sizes)]
    else:
        found = _ranked(cfg, topology, program, sizes)
    if as_json:
        return json.dumps([_fields(one, kind) for one in found])
    lines = [f"{'mesh':<28} {'fits':<5} {'weights':>9} {'cache':>9}   floor ms (compute, HBM, ICI)"]
    for one in found:
        times = [f"{1e3 * t:9.3f}" for t in (one.compute_s, one.hbm_s, one.ici_s)]
        lines.append(
            f"{one.mesh!s:<28} {'yes' if slices.fits(one, kind) else 'no':<5} "
            f"{one.weights / 2**30:6.2f}GiB {one.cache / 2**30:6.2f}GiB   {' '.join(times)}"
        )
    return "\n".join([*lines, smallest_line(cfg, kind, program, sizes)])


def _ranked(cfg: ModelConfig, topology: str, program: str, sizes: Sizes) -> list[slices.Estimate]:
    kind, devices = generation(topology), slices.devices_of(topology)
    found = slices.ranked(cfg, kind, devices, program, sizes)
    if not found:
        raise ValueError(
            f"no mesh of {devices} devices divides this model and a batch of {sizes.batch}: name "
            "one with --mesh to see why"
        )
    return found


def check_size(mesh: MeshShape, topology: str) -> None:
    """Whether a mesh has as many devices as a slice.

    Raises:
        ValueError: it has not.
    """
    devices = slices.devices_of(topology)
    if mesh.num_devices != devices:
        raise ValueError(f"mesh {mesh} has {mesh.num_devices} devices, {topology} has {devices}")


def _fields(one: slices.Estimate, kind: str) -> dict[str, object]:
    return {
        "mesh": str(one.mesh),
        "fits": slices.fits(one, kind),
        "weights": one.weights,
        "cache": one.cache,
        "floor": {"compute": one.compute_s, "HBM": one.hbm_s, "ICI": one.ici_s},
    }


def smallest_line(cfg: ModelConfig, kind: str, program: str, sizes: Sizes) -> str:
    """One line: the smallest slice of a generation, by size alone."""
    found = slices.smallest(cfg, kind, program, sizes)
    if found is None:
        return f"no {kind} slice of up to {slices.slices_of(kind)[-1]} holds it"
    return f"smallest {kind} slice that holds it: {found[0]} with mesh {found[1].mesh}"


def advice(cfg: ModelConfig, report: Report, sizes: Sizes) -> str:
    """The report, and what to rent."""
    kind = generation(report.topology)
    return f"{text(report)}\n{smallest_line(cfg, kind, report.program, sizes)}"
