"""The server put together, and its life: listen, load, serve, drain, stop. Imports no jax."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from serving.frontend import Frontend
from serving.generated import inference_pb2_grpc, models_pb2_grpc
from serving.grpc_service import SERVICES, Inference, Models
from serving.health import Health
from serving.http.app import HEALTH_PATHS, PAGE_PATHS, make_app
from serving.http.gate import Gate
from serving.http.listener import Listener
from serving.metrics import Metrics
from serving.security import TlsFiles, TokenCheck, Tokens, is_loopback
from serving.settings import Limits

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)

# For answers that are still being written when the grace is over.
_LAST_WRITES_SECONDS = 2.0


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens and who may call it. port 0 is a free one; grace in seconds.

    http_port: None for no HTTP. vllm_metrics: tell Prometheus vLLM's names as well.
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


class Server:
    """start -> wait -> stop. open_engine is called in the engine's thread, once the port is taken."""

    def __init__(self, config: ServerConfig, open_engine: Callable[[], Engine]) -> None:
        self.config = config
        self.frontend = Frontend(open_engine, config.name, config.limits)
        self.health = Health(*SERVICES)
        self.frontend.on_health.append(self._on_health)
        self.port = 0
        size = config.limits.max_message_bytes
        checks = [] if config.tokens is None else [TokenCheck(config.tokens, config.health_is_open)]
        self._grpc = grpc.aio.server(
            interceptors=checks,
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                ("grpc.keepalive_time_ms", 60_000),  # finds clients that went away without a word
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(Inference(self.frontend), self._grpc)
        models_pb2_grpc.add_ModelsServicer_to_server(Models(self.frontend), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._grpc)
        self.http = None if config.http_port is None else self._make_http(config.http_port)

    def _make_http(self, port: int) -> Listener:
        config, patience = self.config, self.config.limits.stall_seconds
        app = Gate(
            make_app(self.frontend, Metrics(self.frontend, config.vllm_metrics)),
            tokens=config.tokens,
            open_paths=PAGE_PATHS | (HEALTH_PATHS if config.health_is_open else frozenset()),
            local_only=is_loopback(config.host) and config.tokens is None and config.tls is None,
            patience=patience,
        )
        return Listener(app, config.host, port, config.tls.context() if config.tls else None, patience)

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
        host = f"[{config.host}]" if ":" in config.host and not config.host.startswith("[") else config.host
        address = f"{host}:{config.port}"
        try:
            if config.tls is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, config.tls.credentials())
        except RuntimeError as error:
            raise ValueError(f"cannot listen on {address}; is the port taken? choose another --port") from error
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
        await self.frontend.stop()

    async def _stop_listening(self, grace: float) -> None:
        """Answers that are being written have `grace` seconds to end."""
        await asyncio.gather(self._grpc.stop(grace), *([] if self.http is None else [self.http.stop(grace)]))

    async def wait_until_dead(self) -> None:
        """Until the engine has failed for good."""
        await self.frontend.dead.wait()

    def _on_health(self, healthy: bool) -> None:
        log.info("health: %s", "SERVING" if healthy else "NOT_SERVING")
        self.health.set(healthy)
