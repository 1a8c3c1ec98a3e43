"""The waiting sequences, by priority and arrival. Imports no jax."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from jaxinfer.scheduler.sequence import Sequence


class WaitingQueue:
    """Smallest `order` first. A removed sequence leaves the heap when it surfaces, or when half the heap is removed."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], Sequence]] = []
        self._members: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members

    def push(self, sequence: Sequence) -> None:
        assert sequence not in self._members
        self._members.add(sequence)
        heappush(self._heap, (sequence.order, sequence))

    def head(self) -> Sequence | None:
        while self._heap and self._heap[0][1] not in self._members:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        self._members.remove(sequence)
        if len(self._heap) > 2 * len(self._members):
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapify(self._heap)
