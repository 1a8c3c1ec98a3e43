"""Percentiles of a stream of numbers, exact while they are few, from a log-spaced histogram once they are many."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

BUCKETS_PER_DECADE = 50  # a bucket's ends are 4.7% apart, so a percentile from the histogram is within 2.4%
SMALLEST = 1e-7  # anything below, zero and negative clock noise included, is counted in bucket 0


@dataclass(frozen=True)
class DistributionStats:
    """What was seen so far. Percentiles are 0 where `count` is 0.

    buckets: (upper bound, number of values at or below it and above the one before), ascending, empty ones left out.
    exact: whether percentiles come from the values themselves and not from the buckets.
    """

    count: int = 0
    total: float = 0.0
    minimum: float = 0.0
    maximum: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    exact: bool = True
    buckets: tuple[tuple[float, int], ...] = ()

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class Distribution:
    """Counts values of any positive size in bounded memory.

    The first `max_samples` values are kept and give exact percentiles; from the next one on, only the histogram is.
    """

    __slots__ = ("_counts", "_samples", "count", "max_samples", "maximum", "minimum", "total")

    def __init__(self, max_samples: int = 16384) -> None:
        self.max_samples = max_samples
        self.count = 0
        self.total = 0.0
        self.minimum = math.inf
        self.maximum = -math.inf
        self._samples: list[float] | None = []
        self._counts: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Count one finite value."""
        self.count += 1
        self.total += value
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)
        bucket = _bucket(value)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        if self._samples is not None:
            if len(self._samples) < self.max_samples:
                self._samples.append(value)
            else:
                self._samples = None

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def percentile(self, percent: float) -> float:
        """The value with `percent` per cent of all at or below it, interpolated; 0 where nothing was counted."""
        if not self.count:
            return 0.0
        if self._samples is not None:
            return _interpolate(sorted(self._samples), percent)
        return self._from_buckets(percent)

    def stats(self, *, exact: bool = True) -> DistributionStats:
        """exact=False: percentiles from the histogram, however few the values: quick, for those who ask often."""
        if not self.count:
            return DistributionStats()
        is_exact = exact and self._samples is not None
        if exact and self._samples is not None:
            ordered = sorted(self._samples)
            p50, p95, p99 = (_interpolate(ordered, percent) for percent in (50, 95, 99))
        else:
            p50, p95, p99 = (self._from_buckets(percent) for percent in (50, 95, 99))
        return DistributionStats(
            count=self.count,
            total=self.total,
            minimum=self.minimum,
            maximum=self.maximum,
            p50=p50,
            p95=p95,
            p99=p99,
            exact=is_exact,
            buckets=tuple((_upper(bucket), self._counts[bucket]) for bucket in sorted(self._counts)),
        )

    def _from_buckets(self, percent: float) -> float:
        rank = percent / 100 * (self.count - 1)
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if rank < seen:
                middle = _upper(bucket) * 10 ** (-0.5 / BUCKETS_PER_DECADE) if bucket else 0.0
                return min(max(middle, self.minimum), self.maximum)
        return self.maximum


def _bucket(value: float) -> int:
    """0 up to SMALLEST; bucket b holds SMALLEST * 10 ** ((b - 1) / 50) < value <= SMALLEST * 10 ** (b / 50)."""
    return 0 if value <= SMALLEST else math.ceil(BUCKETS_PER_DECADE * math.log10(value / SMALLEST))


def _upper(bucket: int) -> float:
    return SMALLEST * 10 ** (bucket / BUCKETS_PER_DECADE)


def _interpolate(ordered: list[float], percent: float) -> float:
    position = percent / 100 * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
