"""What an engine counts, and the closing table. Plain Python: imports no jax and no numpy."""

from jaxinfer.metrics.distribution import Distribution, DistributionStats
from jaxinfer.metrics.recorder import EngineMetrics, EngineStats
from jaxinfer.metrics.table import format_bytes, format_seconds, format_table

__all__ = [
    "Distribution",
    "DistributionStats",
    "EngineMetrics",
    "EngineStats",
    "format_bytes",
    "format_seconds",
    "format_table",
]
