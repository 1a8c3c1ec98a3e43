"""A real server with an HTTP port, in the test's own event loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from jaxinfer.engine import Engine
from serving.server import Server, ServerConfig
from serving.settings import Limits
from tests.serving.harness import serving

GREEDY = {"model": "small", "temperature": 0, "ignore_eos": True}


def url(server: Server) -> str:
    assert server.http is not None
    return f"{'http' if server.config.tls is None else 'https'}://localhost:{server.http.port}"


@asynccontextmanager
async def http_serving(
    engine: Engine, limits: Limits | None = None, **config: Any
) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    async with (
        serving(engine, limits, http_port=0, **config) as server,
        httpx.AsyncClient(base_url=url(server), timeout=20) as client,
    ):
        yield server, client


@contextmanager
def threaded_server(engine: Engine, **config: Any) -> Iterator[str]:
    """Its address, for tests that block."""
    ready = threading.Event()
    box: list[Any] = []

    async def main() -> None:
        server = Server(ServerConfig("small", port=0, http_port=0, **config), lambda: engine)
        stop = asyncio.Event()
        await server.listen()
        await server.load()
        box.extend((url(server), asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(120)
    address, loop, stop = box
    try:
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()


def events(text: str) -> list[Any]:
    """What the lines of a stream of server-sent events hold; the last is held to be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(item) for item in data[:-1]]
