"""What Prometheus is told: a picture of the engine's own counts, made when it asks. Imports no jax.

Nothing here runs in a step: the engine counts for itself (jaxinfer/metrics), and a scrape costs one quick copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from jaxinfer.metrics import DistributionStats, EngineStats
from serving.frontend import Frontend

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class _Metric:
    """One of ours, without the prefix jaxinfer_, and what vLLM calls the same."""

    name: str
    text: str
    read: Callable[[EngineStats], Any]
    vllm: tuple[str, ...] = ()


_GAUGES = (
    _Metric("num_requests_running", "Sequences in the batch.", lambda s: s.num_running, ("num_requests_running",)),
    _Metric("num_requests_waiting", "Sequences in the queue.", lambda s: s.num_waiting, ("num_requests_waiting",)),
    _Metric(
        "kv_cache_usage_ratio",
        "Part of the KV cache's pages in use, 0 to 1.",
        lambda s: s.kv_usage,
        ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    ),
    _Metric("kv_cache_bytes", "Size of the KV cache.", lambda s: s.kv_cache_bytes),
)
_COUNTERS = (
    _Metric("prompt_tokens", "Tokens of accepted prompts.", lambda s: s.num_prompt_tokens, ("prompt_tokens",)),
    _Metric("generation_tokens", "Tokens generated.", lambda s: s.num_output_tokens, ("generation_tokens",)),
    _Metric(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.num_queried_prompt_tokens,
        ("prefix_cache_queries",),
    ),
    _Metric(
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.num_cached_prompt_tokens,
        ("prefix_cache_hits",),
    ),
    _Metric(
        "preemptions",
        "Times that a sequence gave up its pages to others.",
        lambda s: s.num_preemptions,
        ("num_preemptions",),
    ),
    _Metric("steps", "Steps of the engine.", lambda s: s.num_steps),
    _Metric("compilations", "Programs that XLA compiled.", lambda s: s.num_programs_compiled),
    _Metric("compilation_seconds", "Time that compiling took.", lambda s: s.compile_seconds),
    _Metric("programs_loaded", "Programs from the compilation cache.", lambda s: s.num_programs_loaded),
)
_HISTOGRAMS = (
    _Metric(
        "time_to_first_token_seconds",
        "From a request's arrival to its first token.",
        lambda s: s.time_to_first_token,
        ("time_to_first_token_seconds",),
    ),
    _Metric(
        "inter_token_latency_seconds",
        "Between two tokens of a completion.",
        lambda s: s.inter_token_latency,
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    ),
    _Metric(
        "request_queue_time_seconds",
        "From a request's arrival to its first step.",
        lambda s: s.queue_time,
        ("request_queue_time_seconds",),
    ),
    _Metric(
        "request_prefill_time_seconds",
        "From a request's first step to its first token.",
        lambda s: s.prefill_time,
        ("request_prefill_time_seconds",),
    ),
    _Metric(
        "request_decode_time_seconds",
        "From a request's first token to its end.",
        lambda s: s.decode_time,
        ("request_decode_time_seconds",),
    ),
    _Metric(
        "e2e_request_latency_seconds",
        "From a request's arrival to its end.",
        lambda s: s.end_to_end_time,
        ("e2e_request_latency_seconds",),
    ),
    _Metric(
        "request_prompt_tokens",
        "Tokens of a request's prompt.",
        lambda s: s.request_prompt_tokens,
        ("request_prompt_tokens",),
    ),
    _Metric(
        "request_generation_tokens",
        "Tokens generated for a request.",
        lambda s: s.request_output_tokens,
        ("request_generation_tokens",),
    ),
    _Metric("step_seconds", "One step of the engine.", lambda s: s.step_time),
    _Metric("step_host_seconds", "The part of a step in which the device waited.", lambda s: s.step_host_time),
)

# Five bounds a decade; each is also a bound of the engine's finer histogram, so that nothing is interpolated.
_TIME_BOUNDS = tuple(10 ** (k / 5) for k in range(-20, 16))  # 0.1 ms to 1000 s
_TOKEN_BOUNDS = tuple(10 ** (k / 5) for k in range(31))  # 1 to a million


class Metrics:
    """The server's registry: its own metrics and the process's (memory, file descriptors)."""

    def __init__(self, frontend: Frontend, vllm_names: bool) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_FrontendCollector(frontend, vllm_names))
        ProcessCollector(registry=self._registry)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format (CONTENT_TYPE)."""
        return generate_latest(self._registry)


class _FrontendCollector(Collector):
    def __init__(self, frontend: Frontend, vllm_names: bool) -> None:
        self._frontend = frontend
        self._vllm_names = vllm_names

    def collect(self) -> Iterator[Any]:
        frontend, model = self._frontend, [self._frontend.name]
        healthy = GaugeMetricFamily("jaxinfer_healthy", "1 while requests are taken.", labels=["model_name"])
        healthy.add_metric(model, float(frontend.healthy))
        yield healthy
        refused = CounterMetricFamily(
            "jaxinfer_requests_rejected",
            "Calls refused, or cut off by the server, by status.",
            labels=["model_name", "reason"],
        )
        for reason, count in sorted(frontend.refusals.counts.items()):
            refused.add_metric([*model, reason.lower()], count)
        yield refused
        if frontend.engine_metrics is None:
            return
        stats = frontend.engine_metrics.snapshot(exact=False)
        yield from self._families("jaxinfer_", stats, lambda metric: (metric.name,))
        if self._vllm_names:
            yield from self._families("vllm:", stats, lambda metric: metric.vllm)
            cache = InfoMetricFamily("vllm:cache_config", "The cache's size.", labels=["model_name"])
            facts = frontend.facts
            cache.add_metric(model, {"block_size": str(facts.page_size), "num_gpu_blocks": str(facts.num_pages)})
            yield cache

    def _families(self, prefix: str, stats: EngineStats, names: Callable[[_Metric], tuple[str, ...]]) -> Iterator[Any]:
        model = [self._frontend.name]
        for metrics, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for metric in metrics:
                for name in names(metric):
                    made = family(prefix + name, metric.text, labels=["model_name"])
                    made.add_metric(model, metric.read(stats))
                    yield made
        finished = CounterMetricFamily(
            prefix + "request_success" if prefix == "vllm:" else prefix + "requests_finished",
            "Requests that have ended, by the reason of their first completion.",
            labels=["model_name", "finished_reason"],
        )
        for reason, count in sorted(stats.num_finished.items()):
            finished.add_metric([*model, reason], count)
        yield finished
        if prefix == "jaxinfer_" and stats.expert_tokens:
            chosen = CounterMetricFamily(
                "jaxinfer_expert_tokens",
                "Tokens that an expert was chosen for.",
                labels=["model_name", "layer", "expert"],
            )
            for layer, counts in stats.expert_tokens.items():
                for expert, count in enumerate(counts):
                    chosen.add_metric([*model, str(layer), str(expert)], count)
            yield chosen
        for metric in _HISTOGRAMS:
            seen: DistributionStats = metric.read(stats)
            bounds = _TOKEN_BOUNDS if metric.name.endswith("_tokens") else _TIME_BOUNDS
            for name in names(metric):
                made = HistogramMetricFamily(prefix + name, metric.text, labels=["model_name"])
                made.add_metric(model, _cumulative(seen, bounds), seen.total)
                yield made


def _cumulative(seen: DistributionStats, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """(bound, values at or below it) for each bound, and for infinity."""
    result, count, finer = [], 0, iter((*seen.buckets, (float("inf"), 0)))
    upper, more = next(finer)
    for bound in bounds:
        while upper <= bound * (1 + 1e-9):  # both are rounded powers
            count += more
            upper, more = next(finer)
        result.append((f"{bound:.4g}", count))
    return [*result, ("+Inf", seen.count)]
