"""Traces: one span a request, under its caller's, whatever the protocol and however it ends."""

from __future__ import annotations

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxinfer.engine import Engine
from serving.client import AsyncClient
from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc
from serving.tracing import otlp_exporter
from tests.serving.harness import GREEDY, Brake, address, run, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Spans(InMemorySpanExporter):
    """Keeps what it was given when it is shut down."""

    def shutdown(self) -> None:
        pass


def check(span: ReadableSpan, num_tokens: int) -> None:
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == num_tokens
    assert span.attributes["gen_ai.request.max_tokens"] == num_tokens
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert span.start_time is not None
    assert span.end_time is not None
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    assert [event.name for event in span.events] == ["scheduled", "first token"]
    assert times == sorted(times)


def test_grpc_request(engine: Engine) -> None:
    spans = Spans()

    async def scenario() -> None:
        async with serving(engine, spans=spans) as server, grpc.aio.insecure_channel(address(server)) as channel:
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=[1, 2, 3]),
                sampling=pb.Sampling(temperature=0),
                stopping=pb.Stopping(max_tokens=3, ignore_eos=True),
            )
            await inference_pb2_grpc.InferenceStub(channel).Generate(request, metadata=[("traceparent", TRACEPARENT)])

    run(scenario())
    (span,) = spans.get_finished_spans()
    check(span, 3)
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.input_tokens"] == 3


def test_http_request(engine: Engine) -> None:
    spans = Spans()

    async def scenario() -> None:
        async with serving(engine, http_port=0, spans=spans) as server, httpx.AsyncClient() as client:
            assert server.http is not None
            answer = await client.post(
                f"http://localhost:{server.http.port}/v1/completions",
                json={"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True},
                headers={"traceparent": TRACEPARENT},
            )
            assert answer.status_code == 200, answer.text

    run(scenario())
    (span,) = spans.get_finished_spans()
    check(span, 4)


def test_requests_without_a_trace_begin_their_own(engine: Engine) -> None:
    spans = Spans()

    async def scenario() -> None:
        async with serving(engine, spans=spans) as server, AsyncClient(address(server)) as client:
            for _ in range(2):
                await client.generate([1, 2], max_tokens=1, **GREEDY)

    run(scenario())
    first, second = spans.get_finished_spans()
    assert first.parent is None
    assert second.parent is None
    assert first.context is not None
    assert second.context is not None
    assert first.context.trace_id != second.context.trace_id


@pytest.mark.parametrize("errors_expected", [True])
def test_failure_is_the_spans_status(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = Spans()

    async def scenario() -> None:
        async with serving(engine, spans=spans) as server, AsyncClient(address(server), max_tries=1) as client:
            brake = Brake(engine, monkeypatch)
            brake.fail = 2
            brake.release()
            with pytest.raises(grpc.aio.AioRpcError):
                await client.generate([1, 2], max_tokens=4, **GREEDY)

    run(scenario())
    (span,) = spans.get_finished_spans()
    assert span.status.status_code.name == "ERROR"
    assert span.attributes is not None
    assert span.attributes["error.type"] == "INTERNAL"


def test_endpoint_that_is_no_url() -> None:
    with pytest.raises(ValueError, match="--otlp-endpoint localhost:4318 is no URL; give one such as http://"):
        otlp_exporter("localhost:4318")


def test_collector_gets_the_span(engine: Engine) -> None:
    """The exporter that --otlp-endpoint makes, and a collector of OTLP over HTTP."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        exporter = otlp_exporter(f"http://127.0.0.1:{collector.server_port}/v1/traces")

        async def scenario() -> None:
            async with serving(engine, spans=exporter) as server, AsyncClient(address(server)) as client:
                await client.generate([1, 2, 3], max_tokens=2, **GREEDY)

        run(scenario())
        collector.shutdown()
    ((path, body),) = received
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    (span,) = resource.scope_spans[0].spans
    assert span.name == "generate small"
    assert {item.key: item.value.int_value for item in span.attributes}["gen_ai.usage.output_tokens"] == 2
