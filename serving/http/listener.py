"""The HTTP port: uvicorn inside the server's own event loop. Imports no jax."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.http.gate import ABORT, NUM_CONNECTIONS

# What a connection may hold of answers that are not read, in the kernel and here; beyond it a stream is merged.
_SEND_BUFFER = 65536
_MAX_HEADER_BYTES = 65536
_KEEP_ALIVE_SECONDS = 30


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's."""
        yield


class Listener:
    """listen -> stop. patience: seconds in which a connection must bring a request's head or take an answer's end.

    max_connections: the app refuses what comes on more, and what is beyond twice as many is cut without a word.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        context: ssl.SSLContext | None,
        patience: float,
        max_connections: Callable[[], int],
    ) -> None:
        self.host, self.port = host, port
        config = uvicorn.Config(
            app,
            http=partial(_Protocol, patience),  # pyright: ignore[reportArgumentType]
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        )
        config.load()
        config.ssl = context
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # clients that speak no HTTP are no news
        self._max_connections = max_connections
        self._server = _Uvicorn(config)
        self._serving: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Take the port. ValueError, in one line, where that cannot be."""
        try:
            sockets = _bound(self.host, self.port, lambda: 2 * self._max_connections())
        except OSError as error:
            where = f"{self.host} port {self.port}"
            raise ValueError(
                f"cannot listen on {where} ({error.strerror or error}); is the port taken? choose another --http-port"
            ) from error
        self.port = sockets[0].getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0)
        if self._serving.done():
            self._serving.result()

    async def stop(self, grace: float) -> None:
        """Take no more connections, let answers end for `grace` seconds, and cut the rest."""
        if self._serving is None:
            return
        self._server.should_exit = True
        _, left = await asyncio.wait((self._serving,), timeout=grace)
        if left:
            self._server.force_exit = True
            while not self._serving.done():
                for connection in list(self._server.server_state.connections):
                    connection.transport.abort()
                await asyncio.wait((self._serving,), timeout=0.05)
        await self._serving


class _Protocol(H11Protocol):
    """uvicorn's, with an end for connections that bring no request and for answers' ends that nobody reads."""

    def __init__(self, patience: float, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._patience = patience

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_SEND_BUFFER)
        self.app_state = {**self.app_state, ABORT: transport.abort, NUM_CONNECTIONS: self.connections.__len__}
        self._timer = self.loop.call_later(self._patience, self._cut_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._timer.cancel()
        self._timer = self.loop.call_later(self._patience + _KEEP_ALIVE_SECONDS, self._cut_if_idle)

    def _cut_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class _Door(socket.socket):
    """A listening socket that cuts what comes while `most` connections are open, those in TLS's handshake among them.

    connections: those that were accepted, by all sockets of the port.
    """

    def __init__(self, kind: Any, connections: WeakSet[socket.socket], most: Callable[[], int]) -> None:
        super().__init__(*kind)
        self._connections = connections
        self._most = most

    def accept(self) -> tuple[socket.socket, Any]:
        """Called by asyncio, for which ConnectionAbortedError is a client that left early."""
        connection, address = super().accept()
        most = self._most()
        if len(self._connections) >= most and sum(known.fileno() >= 0 for known in self._connections) >= most:
            connection.close()
            raise ConnectionAbortedError
        self._connections.add(connection)
        return connection, address


def _bound(host: str, port: int, most: Callable[[], int]) -> list[socket.socket]:
    """A socket for each address of the host, all on one port, which take so many connections at a time."""
    infos = list(dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)))
    sockets: list[socket.socket] = []
    connections: WeakSet[socket.socket] = WeakSet()
    try:
        for family, kind, protocol, _, address in infos:
            one = _Door((family, kind, protocol), connections, most)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(len(infos) > 1))
            chosen = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            one.bind((address[0], chosen, *address[2:]))
            one.setblocking(False)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets
