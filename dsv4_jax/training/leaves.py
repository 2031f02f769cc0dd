"""Walks grouped parameters together with their specs: every rule about leaves reads metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsv4_jax.config import ModelConfig
from dsv4_jax.model import is_scanned
from dsv4_jax.params import ParamSpec, unit_specs
from dsv4_jax.schedule import layer_groups

# Which sides of the model learn, by the `learn` of a phase.
SIDES = {
    "trunk": ("trunk", "mtp"),
    "indexer": ("indexer",),
    "mtp": ("mtp",),
    "all": ("trunk", "indexer", "mtp"),
}


class Place(NamedTuple):
    """A leaf: its path in the grouped tree, its name inside its unit, and its spec.

    repeats: length of the leading dimension of stacked layers; None where there is none.
    siblings: specs beside it, by name.
    """

    path: tuple[Any, ...]
    name: tuple[str, ...]
    spec: ParamSpec
    repeats: int | None
    siblings: dict[str, Any]

    @property
    def is_index(self) -> bool:
        """Whether it belongs to an indexer."""
        return "indexer" in self.name

    @property
    def side(self) -> str:
        """What it learns with: "indexer", "mtp" (of an MTP block) or "trunk"."""
        if self.is_index:
            return "indexer"
        return "mtp" if self.path[0] == "mtp" else "trunk"


def spec_tree(cfg: ModelConfig, scan: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Specs in grouped form (of one layer each), and the repeats of every group."""
    units = unit_specs(cfg)
    layers = [units[name] for name in units if name.startswith("layer_")]
    groups = layer_groups(cfg, scan)
    tree = {
        "top": units["top"],
        "groups": [[layers[g.start + i] for i in range(len(g.kinds))] for g in groups],
        "mtp": [units[name] for name in units if name.startswith("mtp_")],
    }
    return tree, {"groups": [g.repeats if g.repeats > 1 else None for g in groups]}


def places(cfg: ModelConfig, scan: bool) -> Iterator[Place]:
    """Every leaf of the grouped tree."""
    tree, repeats = spec_tree(cfg, scan)
    yield from _walk(tree["top"], ("top",), (), None)
    for g, layers in enumerate(tree["groups"]):
        for i, layer in enumerate(layers):
            yield from _walk(layer, ("groups", g, i), (), repeats["groups"][g])
    for i, block in enumerate(tree["mtp"]):
        yield from _walk(block, ("mtp", i), (), None)


def _walk(
    node: dict[str, Any], path: tuple[Any, ...], name: tuple[str, ...], repeats: int | None
) -> Iterator[Place]:
    for key, child in node.items():
        if isinstance(child, dict):
            yield from _walk(child, (*path, key), (*name, key), repeats)
        else:
            yield Place((*path, key), (*name, key), child, repeats, node)


def map_places(rule: Callable[..., Any], cfg: ModelConfig, first: Any, *rest: Any) -> Any:
    """A tree like `first` (grouped parameters) of `rule(place, leaf, …)`."""
    found = {p.path: p for p in places(cfg, is_scanned(cfg, first))}

    def walk(path: tuple[Any, ...], *nodes: Any) -> Any:
        if path in found:
            return rule(found[path], *nodes)
        if isinstance(nodes[0], dict):
            return {k: walk((*path, k), *(n[k] for n in nodes)) for k in nodes[0]}
        return [walk((*path, i), *(n[i] for n in nodes)) for i in range(len(nodes[0]))]

    return walk((), first, *rest)


def map_leaves(rule: Callable[..., Any], cfg: ModelConfig, first: Any, *rest: Any) -> Any:
    """`map_places` for rules that only need the spec."""
    return map_places(lambda place, *leaves: rule(place.spec, *leaves), cfg, first, *rest)
