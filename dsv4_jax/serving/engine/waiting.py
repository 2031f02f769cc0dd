"""Requests that wait for a slot: how many may, and whose turn is next."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dsv4_jax.serving.engine.request import Request


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of the queue; what exceeds them is turned away at once.

    Args:
        requests: Requests that may wait.
        tokens: Prompt tokens that may wait; one request may always.
        tenant_requests: Requests of one tenant that may wait, beside those that can start at once.
        tenant_slots: Slots one tenant may have, preempted requests included.
        timeout_s: How long a request may wait for its first slot.
    """

    requests: int = 256
    tokens: int = 4_000_000
    tenant_requests: int = 256
    tenant_slots: int = 1 << 30
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "tenant_requests", "tenant_slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True)
class Rejection:
    """Why a request was not taken, and after how many seconds to try again.

    `reason` is "queue_full", "tenant_limit" or "draining".
    """

    reason: str
    retry_after_s: int


@dataclass
class _Tenant:
    balance: float = 0.0  # what it may still use; negative after using more
    slots: int = 0
    waiting: list[Request] = field(default_factory=list)  # most urgent first


class WaitingQueue:
    """Deficit round robin over tenants, urgency inside each.

    A tenant pays for what is computed for it. One with a positive balance goes on; when nobody who
    waits has any, everyone gets the same on top. Service that nobody else wanted is not held
    against anyone: who comes back starts level with the best placed.
    """

    def __init__(self, limits: QueueLimits, quantum: int) -> None:
        self.limits = limits
        self.quantum = quantum
        self.tokens = 0  # of the prompts that wait
        self._size = 0
        self._tenants: dict[str, _Tenant] = {}  # in the order of their turns

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        for tenant in self._tenants.values():
            yield from tenant.waiting

    def why_full(self, request: Request, free_slots: int = 0) -> str | None:
        """Why a request cannot wait here while so many slots are free, or None if it can."""
        limits, tenant = self.limits, self._tenants.get(request.tenant)
        over_tokens = self.tokens + len(request.prompt) > limits.tokens
        if self._size >= limits.requests or (self._size and over_tokens):
            return "queue_full"
        if tenant is not None:
            starting = max(min(free_slots, limits.tenant_slots - tenant.slots), 0)
            if len(tenant.waiting) >= limits.tenant_requests + starting:
                return "tenant_limit"
        return None

    def add(self, request: Request) -> None:
        tenant = self._tenants.get(request.tenant)
        if tenant is None or not (tenant.waiting or tenant.slots):
            level = min(0.0, max((t.balance for t in self._busy()), default=0.0))
            tenant = self._tenants.setdefault(request.tenant, _Tenant(balance=level))
            tenant.balance = min(tenant.balance, level)
        insort(tenant.waiting, request, key=lambda r: r.rank)
        self._size += 1
        self.tokens += len(request.prompt)

    def remove(self, request: Request) -> None:
        self._tenants[request.tenant].waiting.remove(request)
        self._size -= 1
        self.tokens -= len(request.prompt)
        self._forget(request.tenant)

    def pick(self, may_start: Callable[[Request], bool]) -> Request | None:
        """Returns whose turn it is among the requests that may start; it stays in the queue."""
        found = {}
        for name, tenant in self._tenants.items():
            if tenant.slots < self.limits.tenant_slots:
                first = next((r for r in tenant.waiting if may_start(r)), None)
                if first is not None:
                    found[name] = first
        if not found:
            return None
        best = max(self._tenants[name].balance for name in found)
        if best <= 0:
            self._top_up((int(-best) // self.quantum + 1) * self.quantum)
        return next(r for name, r in found.items() if self._tenants[name].balance > 0)

    def take_slot(self, name: str) -> None:
        """Says that a request got its first slot; call it before the request leaves the queue."""
        self._tenants[name].slots += 1

    def free_slot(self, name: str) -> None:
        """Says that a request that had a slot has ended; preempted ones keep their claim."""
        self._tenants[name].slots -= 1
        self._forget(name)

    def charge(self, name: str, cost: float) -> None:
        """Takes `cost` off a tenant that has a slot; its turn ends when nothing is left."""
        tenant = self._tenants[name]
        if tenant.balance > 0 >= tenant.balance - cost:
            self._tenants[name] = self._tenants.pop(name)
        tenant.balance -= cost

    def check(self) -> None:
        """Asserts that the counts agree with the queue."""
        waiting = list(self)
        assert self._size == len(waiting) == len(set(waiting)), "queue size is off"
        assert self.tokens == sum(len(r.prompt) for r in waiting), "queued tokens are off"
        for name, tenant in self._tenants.items():
            assert tenant.slots >= 0 and tenant.balance <= self.quantum, f"{name}: {tenant}"
            assert tenant.waiting == sorted(tenant.waiting, key=lambda r: r.rank)
            assert all(r.tenant == name for r in tenant.waiting)

    def slots_of(self, name: str) -> int:
        return self._tenants[name].slots if name in self._tenants else 0

    def _busy(self) -> Iterator[_Tenant]:
        return (t for t in self._tenants.values() if t.waiting or t.slots)

    def _top_up(self, amount: float) -> None:
        for name, tenant in list(self._tenants.items()):
            tenant.balance = min(tenant.balance + amount, self.quantum)
            self._forget(name)  # not everyone: somebody waits

    def _forget(self, name: str) -> None:
        """Drops a tenant that wants nothing and owes nothing; all of them when nobody is busy."""
        tenant = self._tenants[name]
        if not tenant.waiting and not tenant.slots and tenant.balance >= 0:
            del self._tenants[name]
        if not any(self._busy()):
            self._tenants.clear()
