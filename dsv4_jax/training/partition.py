"""Which optimizer moves which parameter, and as which matrices: read off dimension metadata.

Every linear map learns by Muon, as the matrices it logically consists of; embeddings, the output
head, norms, biases, gates, sinks and position biases learn by AdamW.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv4_jax.config import ModelConfig
from dsv4_jax.training.leaves import Place, map_places

Group = Literal["muon", "adamw", "none"]
ROUTING_STATE = {"e", "vA"}  # biases and hash tables: no gradient moves them
EMBEDDINGS = {"VD"}
POSITION_BIASES = {"rd"}


class View(NamedTuple):
    """How a leaf learns.

    rows: a Muon leaf `[..., out, in]` is split along `out` into blocks of these sizes, each an
    independent matrix; dimensions in front are a batch of such leaves.
    groups: `out` consists of this many equal matrices that see different inputs (a batch, too).
    """

    group: Group
    rows: tuple[int, ...] = ()
    groups: int = 1


def view(place: Place, cfg: ModelConfig) -> View:
    """The rule for one leaf.

    Raises:
        ValueError: no rule covers its dimensions.
    """
    spec, dims = place.spec, place.spec.dims
    if dims in ROUTING_STATE:
        return View("none")
    if dims in EMBEDDINGS | POSITION_BIASES or len(dims) == 1:
        return View("adamw")
    out = spec.shape[-2]
    match dims:
        case "hm":  # pre, post and comb are maps of their own
            m = cfg.hc_mult
            return View("muon", (m, m, m * m))
        case "dD":  # overlapped compressors: one half speaks for the next window
            row_dim = place.siblings["norm"].shape[0]
            return View("muon", (row_dim,) * (out // row_dim))
        case "zg":  # each output group reads heads of its own
            return View("muon", (cfg.o_rank,), cfg.o_groups)
        case "EFD" | "EDF":
            return View("muon", (out,))
        case _ if len(dims) == 2:
            return View("muon", (out,))
    raise ValueError(f"no optimizer is assigned to {'/'.join(map(str, place.path))} ({dims})")


def views(cfg: ModelConfig, params: Any) -> Any:
    """The tree of views of grouped parameters."""
    return map_places(lambda place, _: view(place, cfg), cfg, params)


def is_view(node: Any) -> bool:
    return isinstance(node, View)


def labels(cfg: ModelConfig, params: Any) -> Any:
    """The tree of optimizer groups."""
    return jax.tree.map(lambda v: v.group, views(cfg, params), is_leaf=is_view)


def split(leaf: Array, how: View) -> list[Array]:
    """The independent matrices of a Muon leaf, one stack `[n, out, in]` per block of rows."""
    *lead, out, width = leaf.shape
    x = leaf.reshape(*lead, how.groups, out // how.groups, width)
    x = x.reshape(-1, *x.shape[-2:])
    stops = [sum(how.rows[: i + 1]) for i in range(len(how.rows) - 1)]
    return jnp.split(x, stops, axis=1)


def join(parts: list[Array], shape: tuple[int, ...]) -> Array:
    """The inverse of `split` for a leaf of this shape."""
    return jnp.concatenate(parts, axis=1).reshape(shape)
