"""The closing table of a job."""

from __future__ import annotations

from jaxinfer.metrics.distribution import DistributionStats
from jaxinfer.metrics.recorder import EngineStats


def format_seconds(seconds: float) -> str:
    """Three figures and a unit: 812 us, 3.21 ms, 1.50 s, 12 min 5 s."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.9995:
        return _three(seconds * 1e3) + " ms"
    if seconds < 119.5:
        return _three(seconds) + " s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(size: float) -> str:
    """Three figures and a unit of 1024: 512 B, 28.4 MiB, 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{_three(size)} {unit}"
        size /= 1024
    return f"{_three(size)} TiB"


def format_table(stats: EngineStats, elapsed: float) -> str:
    """One row a figure, aligned, ending without a newline. `elapsed`: seconds the job took, for the rates."""
    rows = [
        ("requests", _requests(stats)),
        ("prompt tokens", f"{stats.num_prompt_tokens:,}"),
        ("output tokens", f"{stats.num_output_tokens:,}"),
        ("elapsed", format_seconds(elapsed)),
        ("tokens per second", _rates(stats, elapsed)),
        ("queue time", _percentiles(stats.queue_time)),
        ("time to first token", _percentiles(stats.time_to_first_token)),
        ("inter-token latency", _percentiles(stats.inter_token_latency)),
        ("KV-cache peak", _kv_peak(stats)),
        ("prefix-cache hits", _prefix(stats)),
        ("preemptions", f"{stats.num_preemptions:,}"),
        ("programs compiled", _compiled(stats)),
    ]
    if stats.expert_tokens:
        rows.append(("expert load", _expert_load(stats)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _expert_load(stats: EngineStats) -> str:
    """How much more than its share the most chosen expert of a layer had, and of which layer that is most."""
    uneven = {layer: max(counts) * len(counts) / max(sum(counts), 1) for layer, counts in stats.expert_tokens.items()}
    worst = max(uneven, key=lambda layer: uneven[layer])
    median = sorted(uneven.values())[len(uneven) // 2]
    return f"most chosen over mean: {median:.2f} median of layers, {uneven[worst]:.2f} in layer {worst}"


def _requests(stats: EngineStats) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stats.num_finished.items()))
    return f"{stats.num_requests:,}" + (f" ({reasons})" if reasons else "")


def _rates(stats: EngineStats, elapsed: float) -> str:
    if elapsed <= 0:
        return "-"
    output = stats.num_output_tokens / elapsed
    total = (stats.num_prompt_tokens + stats.num_output_tokens) / elapsed
    return f"{output:,.1f} output, {total:,.1f} with prompts"


def _percentiles(stats: DistributionStats) -> str:
    if not stats.count:
        return "-"
    figures = f"median {format_seconds(stats.p50)}, p95 {format_seconds(stats.p95)}, p99 {format_seconds(stats.p99)}"
    return figures if stats.exact else f"{figures} (within 2.4%)"


def _kv_peak(stats: EngineStats) -> str:
    peak = f"{stats.kv_usage_peak:.1%}"
    return f"{peak} of {format_bytes(stats.kv_cache_bytes)}" if stats.kv_cache_bytes else peak


def _prefix(stats: EngineStats) -> str:
    if not stats.num_queried_prompt_tokens:
        return "off or never asked"
    return (
        f"{stats.num_cached_prompt_tokens:,} of {stats.num_queried_prompt_tokens:,} prompt tokens "
        f"({stats.prefix_cache_hit_rate:.1%})"
    )


def _compiled(stats: EngineStats) -> str:
    took = f" in {format_seconds(stats.compile_seconds)}" if stats.compile_seconds else ""
    loaded = f", {stats.num_programs_loaded:,} more from the compilation cache" if stats.num_programs_loaded else ""
    return f"{stats.num_programs_compiled:,}{took}{loaded}"


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
