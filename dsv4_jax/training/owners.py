"""Muon over a mesh: every matrix is orthogonalised by one device.

Matrices are stored in parts. Devices with parts of the same stack of matrices exchange them, so
that each gets whole matrices of its own. Those that hold the same parts share the stack out, as far
as that leaves anyone less to do: with more devices than matrices, several orthogonalise the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from dsv4_jax.training.muon import orthogonalise_tree
from dsv4_jax.training.partition import View
from dsv4_jax.training.placing import manual_axes
from sharding.rules import entry_axes, manual_spec
from sharding.shards import Shards


class _Kind(NamedTuple):
    """What leaves of one stack have in common.

    shape: of a matrix's part on a device. dim: which of the two dimensions is cut along `axes`.
    same: axes along which devices hold the same parts.
    """

    shape: tuple[int, int]
    view: View
    dim: int
    axes: tuple[str, ...]
    same: tuple[str, ...]


def orthogonalise_owned(
    updates: list[Array], how: list[View], placed: list[PartitionSpec], dtype: Any, shards: Shards
) -> list[Array]:
    """`muon.orthogonalise_tree` of leaves that lie on a mesh as `placed` says."""
    assert isinstance(shards.mesh, Mesh)
    placed = [manual_spec(spec) for spec in placed]
    run = jax.shard_map(
        partial(_local, how, placed, dtype, shards),
        mesh=shards.mesh,
        in_specs=(placed,),
        out_specs=placed,
        axis_names=manual_axes(shards),
        check_vma=False,
    )
    return run(updates)


def _local(
    how: list[View], placed: list[PartitionSpec], dtype: Any, shards: Shards, parts: list[Array]
) -> list[Array]:
    kinds: dict[_Kind, list[int]] = defaultdict(list)
    for i, (part, view, spec) in enumerate(zip(parts, how, placed, strict=True)):
        kinds[_kind(part, view, spec, shards)].append(i)
    stacks = [jnp.concatenate([_stack(parts[i]) for i in members]) for members in kinds.values()]
    owned = [_to_owners(x, kind, shards) for x, kind in zip(stacks, kinds, strict=True)]
    done = orthogonalise_tree(owned, [kind.view for kind in kinds], dtype)
    out = list(parts)
    for x, whole, (kind, members) in zip(stacks, done, kinds.items(), strict=True):
        back, start = _from_owners(whole, len(x), kind, shards)[: len(x)], 0
        for i in members:
            size = len(_stack(parts[i]))
            out[i] = back[start : start + size].reshape(parts[i].shape)
            start += size
    return out


def _stack(part: Array) -> Array:
    """A leaf's part as `[n, out, in]`."""
    return part.reshape(-1, *part.shape[-2:])


def _kind(part: Array, view: View, spec: PartitionSpec, shards: Shards) -> _Kind:
    entries = [entry_axes(entry) for entry in (*spec, *[None] * (part.ndim - len(spec)))]
    out, width = entries[-2:]
    assert not (out and width), "a matrix is cut along one of its dimensions"
    used = {axis for axes in entries for axis in axes}
    same = tuple(axis for axis in shards.token_axes if axis not in used)
    shape = (part.shape[-2], part.shape[-1])
    return _Kind(shape, view, 0 if out else 1, out or width, same)


def _counts(kind: _Kind, shards: Shards) -> tuple[int, int]:
    """Devices that hold parts of a matrix, and those that hold the same ones."""
    parts, same = (math.prod(map(shards.size, axes)) for axes in (kind.axes, kind.same))
    return parts, same


def _owners(count: int, kind: _Kind, shards: Shards) -> tuple[int, int]:
    """Matrices that a device gets of a stack of `count`, and groups of devices that share it out.

    More groups than the fewest that leave nobody more to do would only have more to send back.
    """
    parts, same = _counts(kind, shards)
    per = -(-count // (parts * same))
    groups = next(g for g in range(1, same + 1) if same % g == 0 and g * parts * per >= count)
    return per, groups


def _to_owners(x_noi: Array, kind: _Kind, shards: Shards) -> Array:
    """The whole matrices that this device owns; zeros fill the last devices' shares."""
    parts, _ = _counts(kind, shards)
    per, groups = _owners(len(x_noi), kind, shards)
    x = jnp.pad(x_noi, ((0, per * parts * groups - len(x_noi)), (0, 0), (0, 0)))
    if groups > 1:
        x = x.reshape(groups, per * parts, *x.shape[1:])
        mine = shards.rank_along(kind.same) % groups
        x = lax.dynamic_index_in_dim(x, mine, keepdims=False)
    if parts == 1:
        return x
    return lax.all_to_all(x, kind.axes, 0, 1 + kind.dim, tiled=True)


def _from_owners(x_noi: Array, count: int, kind: _Kind, shards: Shards) -> Array:
    """The inverse of `_to_owners` for a stack of `count`, with its filling."""
    parts, same = _counts(kind, shards)
    _, groups = _owners(count, kind, shards)
    x = x_noi if parts == 1 else lax.all_to_all(x_noi, kind.axes, 1 + kind.dim, 0, tiled=True)
    if groups == 1:
        return x
    members = [list(range(first, first + groups)) for first in range(0, same, groups)]
    return lax.all_gather(x, kind.same, axis=0, tiled=True, axis_index_groups=members)
