"""Reads optimised HLO text: bytes that cross HBM, buffers, copies.

`moved` follows loops (with their trip counts) and takes the dearer branch of a conditional. It
counts operands and results of every top-level operation that lie in HBM; of a fusion only what it
slices out of an operand or puts into one; of a kernel what its own cost estimate says. That is an
upper bound of the traffic: what XLA keeps in VMEM between two operations is marked so and is free.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "f4e2m1fn": 4}
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all copy-done iota "
    "async-done async-update slice-done partition-id replica-id".split()
)
UPDATE_AT = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is written
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
VMEM = re.compile(r"S\(([1-9]\d*)\)")  # any space but HBM


class Buffer(NamedTuple):
    """One array of a shape: where it lies, its text without layout, its logical bytes."""

    in_hbm: bool
    text: str
    size: int


@dataclass
class Op:
    """One operation: what it makes, its kind, what it reads, and the rest of its line."""

    name: str
    buffers: list[Buffer]
    kind: str
    operands: list[str]
    rest: str

    @property
    def size(self) -> int:
        """Bytes in HBM of the results."""
        return sum(b.size for b in self.buffers if b.in_hbm)


@dataclass
class Module:
    """Computations by name, the entry's name, and what is known of their operations."""

    computations: dict[str, dict[str, Op]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    entry: str = ""


def buffers(shape: str) -> list[Buffer]:
    """The arrays of a shape, tuples flattened."""
    found = []
    for kind, dims, layout in SHAPE.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = 8 if kind.startswith("f8") else BITS.get(kind, int(digits[0]) if digits else 0)
        size = math.prod(int(n) for n in dims.split(",") if n) * bits // 8
        found.append(Buffer(not VMEM.search(layout), f"{kind}[{dims}]", size))
    return found


def parse(text: str) -> Module:
    """A module from its text."""
    module, current = Module(), ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = head[2]
            module.computations[current] = {}
            module.entry = current if head[1] else module.entry
        elif current and (found := LINE.match(line)):
            root, name, shape, kind, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
            module.computations[current][name] = Op(name, buffers(shape), kind, operands, rest)
            if root:
                module.roots[current] = name
    return module


def moved(text: str) -> collections.Counter[str]:
    """Bytes that cross HBM in one run, by kind of operation; kernels by their names."""
    module = parse(text)
    return _moved(module, module.entry, {})


def runs(text: str) -> Iterator[tuple[int, dict[str, Op], Op]]:
    """Every operation outside fusions: how often it runs, its neighbours by name, itself.

    Of conditionals all branches count. Of a fusion that sums and keeps a part, a scatter that the
    compiler builds of an all-reduce, this sum follows as `all-reduce-scatter`.
    """
    module = parse(text)

    def walk(name: str, times: int) -> Iterator[tuple[int, dict[str, Op], Op]]:
        here = module.computations.get(name, {})
        for op in here.values():
            yield times, here, op
            if op.kind == "while":
                trips = _trips(module, _called(op, "condition"))
                yield from walk(_called(op, "body"), times * trips)
            elif op.kind in ("call", "async-start"):
                yield from walk(_called(op, "to_apply|calls"), times)
            elif op.kind == "fusion" and "calls=%all-reduce-scatter" in op.rest:
                inside = module.computations.get(_called(op, "calls"), {})
                for part in inside.values():
                    if part.kind == "all-reduce":
                        yield times, inside, replace(part, kind="all-reduce-scatter")
            elif op.kind == "custom-call":  # what moved to a SparseCore
                for name in re.findall(r"called_computations=\{%([\w.\-]+)\}", op.rest):
                    yield from walk(name, times)
            elif op.kind == "conditional":
                parts = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
                names = re.findall(r"[\w.\-]+", parts[1]) if parts else []
                names += [_called(op, f"{branch}_computation") for branch in ("true", "false")]
                for branch in names:
                    yield from walk(branch, times)

    yield from walk(module.entry, 1)


def kernel_flops(text: str) -> collections.Counter[str]:
    """Operations of one run by kernel, as their own cost estimates say."""
    total: collections.Counter[str] = collections.Counter()
    for times, _, op in runs(text):
        if told := re.search(r'"flops":"(\d+)"', op.rest if op.kind == "custom-call" else ""):
            total[_label(op)] += times * int(told[1])
    return total


def largest(text: str, count: int) -> list[str]:
    """The largest arrays in HBM that operations make: what is passed in or updated is none."""
    module, found = parse(text), {}
    old = {
        b.text
        for op in module.computations[module.entry].values()
        if op.kind == "parameter"
        for b in op.buffers
    }
    skipped = FREE | {"while", "conditional", "call"}
    inside = {_called(op, "calls") for ops in module.computations.values() for op in ops.values()}
    for name, ops in module.computations.items():
        if name in inside:
            continue
        for op in ops.values():
            if op.kind in skipped or "output_to_operand_aliasing" in op.rest:
                continue
            for buffer in op.buffers:
                if buffer.in_hbm and buffer.text not in old:
                    found[buffer.text] = buffer.size
    return sorted(found, key=lambda text: -found[text])[:count]


def _moved(module: Module, name: str, done: dict[str, collections.Counter[str]]):
    if name in done:
        return done[name]
    total: collections.Counter[str] = collections.Counter()
    here = module.computations.get(name, {})
    for op in here.values():
        if op.kind == "while":
            condition, body = (_called(op, which) for which in ("condition", "body"))
            times = _trips(module, condition)
            for kind, size in _moved(module, body, done).items():
                total[kind] += times * size
        elif op.kind == "conditional":
            parts = re.search(r"branch_computations=\{([^}]*)\}", op.rest)
            names = re.findall(r"[\w.\-]+", parts[1]) if parts else []
            names += [n for n in (_called(op, f"{b}_computation") for b in ("true", "false")) if n]
            branches = [_moved(module, branch, done) for branch in names]
            total += max(branches, key=lambda b: b.total(), default=collections.Counter())
        elif op.kind in ("call", "async-start") and (target := _called(op, "to_apply|calls")):
            total += _moved(module, target, done)
        elif op.kind not in FREE:
            total[_label(op)] += _traffic(module, here, op)
    done[name] = total
    return total


def _called(op: Op, attribute: str) -> str:
    found = re.search(rf"(?:{attribute})=%?([\w.\-]+)", op.rest)
    return found[1] if found else ""


def _label(op: Op) -> str:
    if op.kind == "custom-call" and "tpu_custom_call" in op.rest:
        return re.sub(r"[.\d]+$", "", op.name)
    return op.kind


def _traffic(module: Module, here: dict[str, Op], op: Op) -> int:
    if op.kind == "custom-call":
        told = re.search(r'"bytes_accessed":"(\d+)"', op.rest)
        return int(told[1]) if told else _reads(here, op) + op.size
    if op.kind == "copy-start":  # its result also names the source
        return op.buffers[0].size * op.buffers[0].in_hbm + op.buffers[1].size * op.buffers[1].in_hbm
    if op.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * op.size
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * _sizes(here, op.operands[1:2])
    if op.kind == "fusion":
        return _fusion(module, here, op)
    return _reads(here, op) + op.size


def _sizes(here: dict[str, Op], names: list[str]) -> int:
    return sum(here[name].size for name in names if name in here)


def _reads(here: dict[str, Op], op: Op) -> int:
    return _sizes(here, op.operands)


def _fusion(module: Module, here: dict[str, Op], op: Op) -> int:
    """Operands that are only sliced count as their slices; those updated in place as the update."""
    inner = _called(op, "calls")
    total, in_place = 0, 0
    for index, name in enumerate(op.operands):
        whole = here[name].size if name in here else 0
        sliced, updated = _use(module, inner, _parameter(module, inner, index))
        used = 0 if sliced is None else sliced + updated
        total += min(whole, used) if used else whole  # used in no known way: all of it
        in_place += whole if updated else 0
    return total + max(op.size - in_place, 0) + _updates(module.computations.get(inner, {}))


def _parameter(module: Module, computation: str, index: int) -> str:
    for name, op in module.computations.get(computation, {}).items():
        if op.kind == "parameter" and int(op.rest.split(")")[0]) == index:
            return name
    return ""


def _use(module: Module, computation: str, name: str) -> tuple[int | None, int]:
    """Bytes sliced out of a value (None: all of it is read), bytes of updates to it in place."""
    inner = module.computations.get(computation, {})
    sliced, updated = 0, 0
    for user in inner.values():
        if name not in user.operands:
            continue
        at = user.operands.index(name)
        more: tuple[int | None, int] = (None, 0)
        if user.kind in ("dynamic-slice", "gather", "slice") and at == 0:
            more = sum(b.size for b in user.buffers), 0
        elif user.kind in UPDATE_AT and at == 0:
            more = 0, sum(b.size for b in inner[user.operands[UPDATE_AT[user.kind]]].buffers)
        elif user.kind in ("bitcast", "reshape", "tuple") or _is_view(user, at):
            more = _use(module, computation, user.name)
        elif user.kind == "fusion":
            target = _called(user, "calls")
            more = _use(module, target, _parameter(module, target, at))
        if more[0] is None:
            return None, 0
        sliced, updated = sliced + more[0], updated + more[1]
    return sliced, updated


def _is_view(user: Op, at: int) -> bool:
    """Whether a nested fusion only names its operand's tiles otherwise: its result aliases it."""
    return (
        user.kind == "fusion" and f"output_to_operand_aliasing={{{{}}: ({at}, {{}})}}" in user.rest
    )


def _updates(inner: dict[str, Op]) -> int:
    found = 0
    for part in inner.values():
        if part.kind in UPDATE_AT:
            source = inner.get(part.operands[UPDATE_AT[part.kind]])
            found += sum(b.size for b in source.buffers) if source else 0
    return found


def _trips(module: Module, condition: str) -> int:
    """How often a loop `i < N` from 0 in steps of 1 runs: the largest number in its condition."""
    tests = module.computations.get(condition, {})
    return max((int(op.rest.split(")")[0]) for op in _constants(module, tests)), default=1)


def _inner(module: Module, ops: dict[str, Op], kind: str) -> Iterator[Op]:
    for op in ops.values():
        if op.kind == "fusion":
            inner = module.computations.get(_called(op, "calls"), {})
            yield from (part for part in inner.values() if part.kind == kind)


def _constants(module: Module, ops: dict[str, Op]) -> Iterator[Op]:
    for op in [*ops.values(), *_inner(module, ops, "constant")]:
        if op.kind == "constant" and re.match(r"\d+\)", op.rest):
            yield op
