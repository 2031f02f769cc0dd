"""Parameters a run begins with, its newest ones, and these as units of checkpoints for serving."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import Params, is_scanned
from dsv4_jax.params import ParamSpec, is_spec, unit_specs
from dsv4_jax.quant import quantize_weight
from dsv4_jax.schedule import layer_groups
from dsv4_jax.training.checkpoint import FOLDER
from dsv4_jax.training.init import InitConfig, init_params
from dsv4_jax.training.placing import placed_shapes
from sharding.shards import SINGLE, Shards

MODEL_FILE = "model.json"
BF16 = jnp.bfloat16
Load = Callable[..., tuple[ModelConfig, Params]]  # what reads converted checkpoints


def model_of(run_dir: str | Path) -> ModelConfig:
    """The model that a run trains.

    Raises:
        ValueError: the directory holds no run.
    """
    path = Path(run_dir) / MODEL_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no run: {path.name} is missing")
    cfg = ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    return cfg.replace(dense_format=None, expert_format=None)


def first_params(
    source: str, cfg: ModelConfig, scan: bool, shards: Shards, load: Load | None
) -> Params:
    """Parameters of a run or of a converted checkpoint, float32 and grouped, where they will lie.

    load: `checkpoints.load.load_checkpoint`.

    Raises:
        ValueError: `source` is neither, or its weights are of another shape than `cfg`'s.
    """
    if load is None or (Path(source) / MODEL_FILE).is_file():
        return newest_params(source, cfg, scan, shards)
    placed = None if shards.mesh is None else shards
    found, params = load(source, scan=scan, dense_dtype=jnp.float32, shards=placed)
    mine, theirs = _shapes(cfg), _shapes(found)
    odd = sorted(name for name in mine | theirs if mine.get(name) != theirs.get(name))
    if odd:
        raise ValueError(
            f"{source}: {odd[0]} is {theirs.get(odd[0], 'missing')} there and "
            f"{mine.get(odd[0], 'missing')} in this run's model ({len(odd)} weights differ)"
        )
    return jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(jnp.float32), params)


def plain_model(source: str | Path, load: Load) -> tuple[ModelConfig, Params]:
    """Model and parameters of a run's newest checkpoint or of a converted one; float32.

    load: `checkpoints.load.load_checkpoint`.

    Raises:
        ValueError: `source` is neither.
    """
    if (Path(source) / MODEL_FILE).is_file():
        cfg = model_of(source)
        return cfg, newest_params(source, cfg)
    cfg, params = load(source, dense_dtype=jnp.float32)
    return cfg, jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == BF16 else a, params)


def mean_params(a: Params, b: Params) -> Params:
    """Half of each, of models that were tuned from the same weights; integers are the first's."""
    return jax.tree.map(lambda x, y: x if x.dtype == jnp.int32 else (x + y) / 2, a, b)


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    found = jax.tree_util.tree_leaves_with_path(unit_specs(cfg), is_leaf=is_spec)
    return {jax.tree_util.keystr(path): spec.shape for path, spec in found}


def newest_params(
    run_dir: str | Path, cfg: ModelConfig, scan: bool | None = None, shards: Shards = SINGLE
) -> Params:
    """Parameters of a run's newest checkpoint, float32 and grouped; `scan` None: as they are.

    shards: where they are to lie, whatever the run's own mesh was.

    Raises:
        ValueError: the run has no checkpoint, or it was grouped otherwise.
    """
    folder = Path(run_dir).resolve() / FOLDER
    options = ocp.CheckpointManagerOptions(read_only=True)
    if not folder.is_dir():
        raise ValueError(f"{run_dir} has no checkpoint yet")
    with ocp.CheckpointManager(
        folder, options=options, item_names=("state", "meta", "routes")
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{run_dir} has no checkpoint yet")
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if scan is not None and meta["scan"] != scan:
            raise ValueError(f"{run_dir} was trained with scan={meta['scan']}: use the same")
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda: init_params(cfg, InitConfig(), key, meta["scan"]))
        like = placed_shapes(cfg, shapes, shards, meta["scan"])
        restore = ocp.args.PyTreeRestore(
            item={"params": like},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": like}),
            partial_restore=True,
        )
        return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"]


def export_units(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, Any]]:
    """Yields (unit, tree) in the storage formats that `cfg` names, one layer at a time.

    Matrices of a quantised role are rounded by the rule that QAT simulated; other leaves take
    their stored dtype.
    """
    units = unit_specs(cfg)
    layers = [name for name in units if name.startswith("layer_")]
    plain = cfg.replace(dense_format=None, expert_format=None)
    yield "top", _stored(cfg, units["top"], params["top"])
    for group, weights in zip(
        layer_groups(cfg, is_scanned(plain, params)), params["groups"], strict=True
    ):
        for repeat in range(group.repeats):
            for offset, stack in enumerate(weights):
                tree = jax.tree.map(lambda a, r=repeat: a[r], stack) if group.repeats > 1 else stack
                name = layers[group.layers(offset)[repeat]]
                yield name, _stored(cfg, units[name], tree)
    for index, tree in enumerate(params["mtp"]):
        yield f"mtp_{index}", _stored(cfg, units[f"mtp_{index}"], tree)


def _stored(cfg: ModelConfig, specs: Any, tree: Any) -> Any:
    def one(spec: ParamSpec, leaf: Array) -> Any:
        fmt = spec.fmt(cfg)
        if fmt is None:
            return leaf.astype(jnp.dtype(spec.dtype))
        return quantize_weight(leaf, fmt, jnp.dtype(cfg.scale_dtype))

    return jax.tree.map(one, specs, tree, is_leaf=is_spec)
