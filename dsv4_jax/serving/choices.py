"""Several answers to one request, read as one stream of numbered items."""

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

from dsv4_jax.serving.worker import Job

T = TypeVar("T")


class Choices(Generic[T]):
    """The jobs of one request. Items come as (index of the job, item)."""

    def __init__(self, jobs: Sequence[Job[T]]) -> None:
        self._jobs = jobs
        self._reading: dict[int, asyncio.Future[list[T] | None]] = {}
        self._open = set(range(len(jobs)))
        self.was_cancelled = False

    async def next(self) -> list[tuple[int, T]] | None:
        """Waits for items of any job and returns all that are ready; None after the last ones.

        Raises:
            Exception: what one of the jobs raised.
        """
        while self._open:
            for index in self._open - self._reading.keys():
                self._reading[index] = asyncio.ensure_future(self._jobs[index].next())
            await asyncio.wait(self._reading.values(), return_when=asyncio.FIRST_COMPLETED)
            if items := self._taken():
                return items
        return None

    def _taken(self) -> list[tuple[int, T]]:
        items: list[tuple[int, T]] = []
        for index in sorted(index for index, read in self._reading.items() if read.done()):
            batch = self._reading.pop(index).result()
            if batch is None:
                self._open.discard(index)
            else:
                items += [(index, item) for item in batch]
        return items

    def cancel(self) -> None:
        """Stops all jobs and whoever waits for them."""
        for job in self._jobs:
            job.cancel()
        for read in self._reading.values():
            read.cancel()
        self._reading.clear()
        self._open.clear()

    def abort(self) -> None:
        """Stops all jobs; whoever waits for their items is told."""
        self.was_cancelled = True
        for job in self._jobs:
            job.cancel()
