"""Distributions against numpy, the recorder's books, and the closing table."""

from __future__ import annotations

import dataclasses
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.metrics import Distribution, EngineMetrics, EngineStats, format_bytes, format_seconds, format_table


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=200), st.sampled_from([0, 25, 50, 95, 99, 100]))
def test_exact_percentiles_are_numpys(values: list[float], percent: int) -> None:
    distribution = Distribution()
    distribution.extend(values)
    assert distribution.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-12)


def test_histogram_percentiles_stay_within_their_bound() -> None:
    rng = random.Random(0)
    values = [rng.lognormvariate(-4, 1.5) for _ in range(20_000)]
    distribution = Distribution(max_samples=100)
    distribution.extend(values)
    stats = distribution.stats()
    assert not stats.exact
    for percent, got in ((50, stats.p50), (95, stats.p95), (99, stats.p99)):
        assert got == pytest.approx(np.percentile(values, percent), rel=0.025)
    assert stats.count == len(values)
    assert stats.total == pytest.approx(sum(values))
    assert (stats.minimum, stats.maximum) == (min(values), max(values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1e6), min_size=1, max_size=100))
def test_every_value_is_in_the_bucket_whose_bounds_hold_it(values: list[float]) -> None:
    distribution = Distribution()
    distribution.extend(values)
    buckets = distribution.stats().buckets
    assert sum(count for _, count in buckets) == len(values)
    for upper, _ in buckets:
        cumulative = sum(count for bound, count in buckets if bound <= upper)
        # One part in 1e9 of slack: a bucket's bound is itself a rounded power.
        assert sum(value <= upper * (1 + 1e-9) for value in values) >= cumulative
        assert sum(value <= upper * (1 - 1e-9) for value in values) <= cumulative


def test_memory_is_bounded() -> None:
    distribution = Distribution(max_samples=10)
    for exponent in range(-40, 40):
        distribution.add(10.0**exponent)
        distribution.add(1.0)
    assert distribution._samples is None
    assert len(distribution._counts) <= 50


def test_nothing_seen_is_all_zero() -> None:
    assert Distribution().percentile(50) == 0
    assert Distribution().stats().count == 0
    assert Distribution().stats().mean == 0
    assert EngineStats() == EngineMetrics().snapshot()


def _busy_metrics() -> EngineMetrics:
    metrics = EngineMetrics(kv_cache_bytes=3 * 1024**2)
    for number in range(3):
        metrics.request_added(num_prompt_tokens=100)
        metrics.request_scheduled(0.001 * number, num_queried_tokens=99, num_cached_tokens=32)
        metrics.first_token(0.010 * (number + 1))
        metrics.tokens_given(1)
        metrics.tokens_given(2, [0.020, 0.030])
    metrics.request_finished("stop", 0.5)
    metrics.request_finished("length", 0.6)
    metrics.request_finished("length", 0.7)
    metrics.preempted()
    metrics.programs_compiled(4, seconds=2.5)
    metrics.programs_loaded(7)
    for usage in (0.25, 0.5, 0.125):
        metrics.step_finished(
            seconds=0.02,
            host_seconds=0.001,
            num_prefill_tokens=0 if usage == 0.5 else 64,
            num_decode_tokens=3,
            num_running=3,
            num_waiting=1,
            kv_usage=usage,
        )
    return metrics


def test_snapshot_holds_what_was_recorded_and_does_not_change() -> None:
    metrics = _busy_metrics()
    stats = metrics.snapshot()
    assert (stats.num_requests, stats.num_prompt_tokens, stats.num_output_tokens) == (3, 300, 9)
    assert dict(stats.num_finished) == {"stop": 1, "length": 2}
    assert (stats.num_queried_prompt_tokens, stats.num_cached_prompt_tokens) == (297, 96)
    assert stats.prefix_cache_hit_rate == pytest.approx(96 / 297)
    assert (stats.num_preemptions, stats.num_programs_compiled, stats.num_programs_loaded) == (1, 4, 7)
    assert (stats.num_steps, stats.num_running, stats.num_waiting) == (3, 3, 1)
    assert (stats.kv_usage, stats.kv_usage_peak) == (0.125, 0.5)
    assert stats.time_to_first_token.p50 == pytest.approx(0.020)
    assert stats.inter_token_latency.count == 6
    assert stats.end_to_end_time.maximum == 0.7
    assert stats.step_prefill_tokens.count == 2
    assert stats.step_decode_tokens.total == 9
    assert stats.step_host_time.mean == pytest.approx(0.001)

    metrics.request_finished("stop")
    metrics.set_gauges(num_running=0, num_waiting=0, kv_usage=0.0)
    assert dict(stats.num_finished) == {"stop": 1, "length": 2}
    after = metrics.snapshot()
    assert (after.num_finished["stop"], after.kv_usage, after.kv_usage_peak) == (2, 0.0, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.num_requests = 5  # type: ignore[misc]


def test_snapshots_are_whole_while_another_thread_records() -> None:
    metrics = EngineMetrics()

    def record() -> None:
        for number in range(3000):
            metrics.request_added(1)
            metrics.tokens_given(1, [1e-6 * 1.07 ** (number % 300)])

    thread = threading.Thread(target=record)
    thread.start()
    while thread.is_alive():
        latencies = metrics.snapshot().inter_token_latency
        assert sum(count for _, count in latencies.buckets) == latencies.count
    thread.join()
    assert metrics.snapshot().num_output_tokens == 3000


def test_closing_table_has_a_row_for_every_figure() -> None:
    table = format_table(_busy_metrics().snapshot(), elapsed=2.0)
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in table.splitlines()}
    assert rows == {
        "requests": "3 (2 length, 1 stop)",
        "prompt tokens": "300",
        "output tokens": "9",
        "elapsed": "2.00 s",
        "tokens per second": "4.5 output, 154.5 with prompts",
        "queue time": "median 1.00 ms, p95 1.90 ms, p99 1.98 ms",
        "time to first token": "median 20.0 ms, p95 29.0 ms, p99 29.8 ms",
        "inter-token latency": "median 25.0 ms, p95 30.0 ms, p99 30.0 ms",
        "KV-cache peak": "50.0% of 3.00 MiB",
        "prefix-cache hits": "96 of 297 prompt tokens (32.3%)",
        "preemptions": "1",
        "programs compiled": "4 in 2.50 s, 7 more from the compilation cache",
    }


def test_table_of_a_job_that_did_nothing() -> None:
    table = format_table(EngineStats(), elapsed=0.0)
    assert "tokens per second    -" in table
    assert "off or never asked" in table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (0.000812, "812 us"),
        (0.00321, "3.21 ms"),
        (0.9999, "1.00 s"),
        (99.96, "100 s"),
        (725, "12 min 5 s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
    assert format_seconds(7260) == "2 h 1 min"


@pytest.mark.parametrize(("size", "text"), [(512, "512 B"), (1023, "1.00 KiB"), (28.4 * 2**20, "28.4 MiB")])
def test_format_bytes(size: float, text: str) -> None:
    assert format_bytes(size) == text
    assert format_bytes(3 * 2**40) == "3.00 TiB"
