"""OpenTelemetry traces: a span for each request that was taken in, made once it is over. Imports no jax.

Attributes follow the semantic conventions for generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/).
A caller's own trace goes on: its `traceparent` (https://www.w3.org/TR/trace-context/) is the span's parent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from serving.deltas import End
from serving.errors import RequestError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from jaxinfer.types import Request
    from serving.frontend import Ask

# What the call that is being answered says of its caller's trace; set by each protocol, in the call's own task.
_CALLER: ContextVar[Mapping[str, str]] = ContextVar("caller")
_HEADERS = ("traceparent", "tracestate")


def note_caller(headers: Iterable[tuple[str, Any]]) -> None:
    """Remember the caller's trace for the requests that this task, and those it starts, send to the engine."""
    _CALLER.set({key: value for key, value in headers if key in _HEADERS and isinstance(value, str)})


def caller() -> Mapping[str, str]:
    return _CALLER.get({})


class Tracer:
    """Sends spans to `exporter` in batches, from a thread of its own: a collector that is gone costs only its spans."""

    def __init__(self, model: str, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxinfer"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxinfer")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, ask: Ask, request: Request, caller: Mapping[str, str], how: End | RequestError) -> None:
        """A request is over: its span, from its arrival until now."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now = time.time_ns()
        arrived = now - round((time.monotonic() - ask.arrival_time) * 1e9)
        span = self._tracer.start_span(
            f"generate {self._model}",
            context=self._propagator.extract(caller),
            kind=SpanKind.SERVER,
            start_time=arrived,
            attributes=_of_request(ask, request, self._model),
        )
        if isinstance(how, End):
            for name, seconds in (("scheduled", how.queue_time), ("first token", how.time_to_first_token)):
                if seconds is not None:
                    span.add_event(name, timestamp=arrived + round(seconds * 1e9))
            span.set_attributes(_of_end(how))
        error = how if isinstance(how, RequestError) else how.error
        if error is not None:
            span.set_attribute("error.type", error.code)
            span.set_status(Status(StatusCode.ERROR, error.message))
        span.end(now)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def otlp_exporter(endpoint: str) -> SpanExporter:
    """To a collector that speaks OTLP over HTTP, such as http://localhost:4318/v1/traces."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"--otlp-endpoint {endpoint} is no URL; give one such as http://localhost:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ValueError(f"{error}; --otlp-endpoint needs pip install 'jaxinfer[tracing]'") from error
    return OTLPSpanExporter(endpoint=endpoint)


def _of_request(ask: Ask, request: Request, model: str) -> dict[str, Any]:
    params = ask.sampling_params
    attributes = {
        "gen_ai.operation.name": "text_completion" if isinstance(ask.prompt, str | tuple) else "chat",
        "gen_ai.request.model": model,
        "gen_ai.response.id": ask.name or request.request_id,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _of_end(end: End) -> dict[str, Any]:
    attributes = {
        "gen_ai.usage.output_tokens": end.num_completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": end.num_cached_tokens,
        "gen_ai.response.finish_reasons": [reason or "none" for reason in end.finish_reasons],
        "gen_ai.server.time_to_first_token": end.time_to_first_token,
        "jaxinfer.queue_seconds": end.queue_time,
        "jaxinfer.decode_seconds": end.decode_time,
        "jaxinfer.preemptions": end.num_preemptions,
    }
    return {name: value for name, value in attributes.items() if value is not None}
