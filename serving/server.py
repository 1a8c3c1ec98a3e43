"""The server put together, and its life: listen, load, serve, drain, stop. Imports no jax."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from serving import health
from serving.calls import CallerNote, MessageCheck
from serving.control import Control, ControlConfig
from serving.frontend import Frontend
from serving.generated import control_pb2_grpc, inference_pb2_grpc, models_pb2_grpc, open_inference_pb2_grpc
from serving.grpc_service import SERVICES, Inference, Models
from serving.health import Health
from serving.http.app import HEALTH_PATHS, PAGE_PATHS, make_app
from serving.http.gate import Gate
from serving.http.listener import Listener
from serving.logs import says_more_than_that_a_client_left
from serving.metrics import Metrics
from serving.open_inference import SERVICE as OPEN_INFERENCE
from serving.open_inference import OpenInference
from serving.refusals import Refusals
from serving.security import TlsFiles, TokenCheck, Tokens, is_loopback
from serving.settings import GRPC_CONNECTIONS, Limits
from serving.tracing import Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)

# For answers that are still being written when the grace is over.
_LAST_WRITES_SECONDS = 2.0


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and who may call it. port 0 is a free one; grace in seconds.

    http_port: None for no HTTP. vllm_metrics: tell Prometheus vLLM's names as well.
    control: listens beside it, for the same callers; None is off. reflection: tell callers what the services are.
    spans: where requests' traces go.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    tls: TlsFiles | None = None
    tokens: Tokens | None = None
    health_is_open: bool = True
    grace: float = 25.0
    limits: Limits = field(default_factory=Limits)
    vllm_metrics: bool = False
    control: ControlConfig | None = None
    reflection: bool = False
    spans: SpanExporter | None = None


class Server:
    """start -> wait -> stop. open_engine is called in the engine's thread, once the port is taken."""

    def __init__(self, config: ServerConfig, open_engine: Callable[[], Engine]) -> None:
        self.config = config
        self.frontend = Frontend(open_engine, config.name, config.limits)
        services = (*SERVICES, OPEN_INFERENCE)
        self.health = Health(*services)
        self.frontend.on_health.append(self._on_health)
        self._tracer = None if config.spans is None else Tracer(config.name, config.spans)
        if self._tracer is not None:
            self.frontend.on_end.append(self._tracer.record)
        self.port = self.control_port = 0
        self._stop_asked = asyncio.Event()
        self._grpc = _make_server(config, self.frontend.refusals)
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self.frontend), self._grpc)
        models_pb2_grpc.add_ModelsServicer_to_server(Models(self.frontend), self._grpc)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(OpenInference(self.frontend), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        if config.reflection:
            from serving.reflection import add_reflection

            add_reflection(self._grpc, (*services, health.SERVICE))
        self._control: Control | None = None
        if config.control is not None:
            self._control = Control(self.frontend, config.control, self.ask_to_stop)
            self._control_grpc = _make_server(config, self.frontend.refusals)
            control_pb2_grpc.add_ControlServicer_to_server(self._control, self._control_grpc)
        self.http = None if config.http_port is None else self._make_http(config.http_port)

    def _make_http(self, port: int) -> Listener:
        config, patience = self.config, self.config.limits.stall_seconds

        def max_connections() -> int:
            return self.frontend.max_connections

        app = Gate(
            make_app(self.frontend, Metrics(self.frontend, config.vllm_metrics)),
            tokens=config.tokens,
            open_paths=PAGE_PATHS | (HEALTH_PATHS if config.health_is_open else frozenset()),
            local_only=is_loopback(config.host) and config.tokens is None and config.tls is None,
            patience=patience,
            refusals=self.frontend.refusals,
            max_connections=max_connections,
        )
        return Listener(app, config.host, port, config.tls.context() if config.tls else None, patience, max_connections)

    async def listen(self) -> None:
        """Take the ports; health says NOT_SERVING. ValueError, in one line, where that cannot be."""
        if self.http is not None:
            await self.http.listen()
        try:
            await self._listen_grpc()
        except ValueError:
            if self.http is not None:
                await self.http.stop(0)
            raise

    async def _listen_grpc(self) -> None:
        config = self.config
        self.port = _take_port(self._grpc, config, config.port, "--port")
        if config.control is not None:
            self.control_port = _take_port(self._control_grpc, config, config.control.port, "--control-port")
            await self._control_grpc.start()
        await self._grpc.start()

    async def load(self) -> None:
        """Load and warm up; health says SERVING afterwards. Raises what loading raised."""
        await self.frontend.start()

    async def drain(self) -> bool:
        """Say NOT_SERVING, refuse what comes, wait for what was accepted; whether all of it ended by itself."""
        deadline = time.monotonic() + self.config.grace
        complete = await self.frontend.drain(self.config.grace)
        self.health.close()
        await self._stop_listening(max(deadline - time.monotonic(), _LAST_WRITES_SECONDS))
        return complete

    async def stop(self) -> None:
        """Cut off what is left, and end the engine's thread."""
        self.health.close()
        await self._stop_listening(0)
        if self._control is not None:
            await self._control.close()
            await self._control_grpc.stop(0)
        await self.frontend.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _stop_listening(self, grace: float) -> None:
        """Answers that are being written have `grace` seconds to end."""
        await asyncio.gather(self._grpc.stop(grace), *([] if self.http is None else [self.http.stop(grace)]))

    async def wait_until_dead(self) -> None:
        """Until the engine has failed for good."""
        await self.frontend.dead.wait()

    def ask_to_stop(self) -> None:
        """Drain, then stop; asking again changes nothing."""
        self._stop_asked.set()

    async def wait_until_asked_to_stop(self) -> None:
        """Until the control service is told to drain, or another process of the group to end."""
        await self._stop_asked.wait()

    def _on_health(self, healthy: bool) -> None:
        log.info("health: %s", "SERVING" if healthy else "NOT_SERVING")
        self.health.set(healthy)


def settle() -> None:
    """For a process that is a server and nothing more, once it is ready: Python's collector leaves out what is there.

    Its full passes over all that loading has made would stop everyone for a tenth of a second each.
    """
    gc.collect()
    gc.freeze()


def _make_server(config: ServerConfig, refusals: Refusals) -> grpc.aio.Server:
    logging.getLogger("grpc._cython.cygrpc").addFilter(says_more_than_that_a_client_left)
    checks = [] if config.tokens is None else [TokenCheck(config.tokens, config.health_is_open, refusals)]
    return grpc.aio.server(
        interceptors=[*checks, CallerNote(), MessageCheck(refusals)],
        options=[
            ("grpc.max_receive_message_length", config.limits.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_allowed_incoming_connections", config.limits.max_connections or GRPC_CONNECTIONS),
            ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
            ("grpc.keepalive_time_ms", 60_000),  # finds clients that went away without a word
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 300_000),  # clients connect anew by themselves
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ],
    )


def _take_port(server: grpc.aio.Server, config: ServerConfig, port: int, flag: str) -> int:
    host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
    address = f"{host}:{port}"
    try:
        if config.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, config.tls.credentials())
    except RuntimeError as error:
        raise ValueError(f"cannot listen on {address}; is the port taken? choose another {flag}") from error
