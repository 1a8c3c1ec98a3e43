"""What every request passes: who may call, from where, and how long an answer may stay unread. Imports no jax."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import RequestError
from serving.http.errors import REASONS, HttpError, ReaderStalled, response_of
from serving.http.receiving import discard_rest, until_gone
from serving.refusals import Refusals
from serving.security import NO_TOKEN, Tokens, is_loopback

log = logging.getLogger(__name__)

# In the scope's state: the function that cuts the connection, and the one that tells how many there are.
ABORT, NUM_CONNECTIONS = "abort", "num_connections"
_PIECE = 65536  # bytes
# The page loads nothing but its own script, and stands in no other page's frame.
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", _POLICY),
    (b"cache-control", b"no-store"),
)


class Gate:
    """An ASGI app around another. open_paths: answered without a token.

    local_only: refuse requests under another name than this machine's own, which pages of other sites would use to
    read a server that asks nobody for a token (DNS rebinding). max_connections: how many it may be one of.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens | None,
        open_paths: frozenset[str],
        local_only: bool,
        patience: float,
        refusals: Refusals,
        max_connections: Callable[[], int],
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._open_paths = open_paths
        self._local_only = local_only
        self._patience = patience
        self._refusals = refusals
        self._max_connections = max_connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "nothing else is spoken here"
        scope["app"] = self  # has the router raise what it cannot route
        has_started = False

        async def send_in_time(message: Message) -> None:
            """In pieces, so that a large answer is waited for as long as it is being read."""
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            body = message.get("body", b"")
            for first in range(0, len(body) - _PIECE, _PIECE):
                await self._send({**message, "body": body[first : first + _PIECE], "more_body": True}, send)
            if len(body) > _PIECE:
                message = {**message, "body": body[(len(body) - 1) // _PIECE * _PIECE :]}
            await self._send(message, send)

        try:
            self._check(scope)
            await self._app(scope, receive, send_in_time)
        except ClientDisconnect:
            pass
        except Exception as error:
            if not isinstance(error, RequestError | HttpError | HTTPException):
                log.exception("%s %s failed", scope["method"], scope["path"])
            if isinstance(error, HttpError):
                peer = scope["client"] or ("unknown", 0)
                where = {"caller": f"{peer[0]}:{peer[1]}", "call": f"{scope['method']} {scope['path']}"}
                self._refusals.note(REASONS[error.status], error.message, **where)
            if has_started:
                scope["state"][ABORT]()
                await until_gone(receive)
                return
            if isinstance(error, HttpError) and error.is_unread and "expect" not in Headers(scope=scope):
                await discard_rest(receive)
            await response_of(error)(scope, receive, send_in_time)

    async def _send(self, message: Message, send: Send) -> None:
        try:
            async with asyncio.timeout(self._patience):
                await send(message)
        except TimeoutError:
            raise ReaderStalled(self._patience) from None

    def _check(self, scope: Scope) -> None:
        headers, is_open = Headers(scope=scope), scope["path"] in self._open_paths
        if self._local_only and not _is_local(headers.getlist("host")):
            message = "a server without tokens answers as localhost only; ask for that, or start it with --tokens-file"
            raise HttpError(403, message, is_unread=True)
        if self._tokens is not None and not (is_open and scope["method"] in ("GET", "HEAD")):
            given = headers.getlist("authorization")
            if len(given) != 1 or not self._tokens.accept(given[0]):
                raise HttpError(401, NO_TOKEN, headers={"www-authenticate": "Bearer"}, is_unread=True)
        count, most = scope["state"][NUM_CONNECTIONS](), self._max_connections()
        if count > most and not is_open:
            message = f"{count} connections are open, and the server takes {most}; close some, or try again later"
            raise HttpError(503, message, headers={"retry-after": "1"}, is_unread=True)


def _is_local(hosts: list[str]) -> bool:
    """Whether the Host header names this machine, with or without a port."""
    if len(hosts) != 1:
        return False
    host, _, port = hosts[0].rpartition(":")
    return is_loopback((host if host and port.isdecimal() else hosts[0]).lower())
