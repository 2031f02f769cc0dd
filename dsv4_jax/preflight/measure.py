"""What a program costs: FLOPs from its trace, collectives from the compiler's own text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import Any

from pallas_kernels import hlo

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
FUSED = "all-reduce-scatter"  # see `hlo.runs`


def flops(jaxpr: Any) -> float:
    """Floating-point operations of matrix products and kernels on one device.

    Loops count as often as they run; of those without a fixed number one turn counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[dim] for dim in params["dimension_numbers"][0][0])
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
        elif name == "pallas_call":
            total += float(getattr(params.get("cost_estimate"), "flops", 0) or 0)
        elif name == "cond":
            total += max(flops(branch.jaxpr) for branch in params["branches"])
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(flops(inner) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def collectives(text: str) -> collections.Counter[str]:
    """Bytes that one device sends in one run of an optimised HLO text, by kind of collective.

    Rings are assumed: n devices send (n-1)/n of what they gather or exchange, twice that of what
    they reduce to all. Of ragged messages the smaller side counts: the other has room for the
    worst case.
    """
    sent: collections.Counter[str] = collections.Counter()
    for times, here, op in hlo.runs(text):
        kind = op.kind.removesuffix("-start")
        if kind not in (*COLLECTIVES, FUSED):
            continue
        size = max((buffer.size for buffer in op.buffers), default=0)
        group = group_size(op.rest)
        if kind == FUSED:
            sent["reduce-scatter"] += round(times * size * (group - 1) / group)
            continue
        if kind == "ragged-all-to-all":
            size = min(size, sum(b.size for b in here[op.operands[0]].buffers))  # one has room
        factor = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1}
        factor |= {"collective-permute": 1}
        sent[kind] += round(times * size * factor.get(kind, (group - 1) / group))
    return sent


def group_size(rest: str) -> int:
    """Devices that a collective joins."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    return 2
