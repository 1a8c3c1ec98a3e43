"""What clients send: JSON bodies, bounded in size and time, and their leaving. Imports no jax."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from serving.http.errors import HttpError

_DISCARD_BYTES, _DISCARD_SECONDS = 32 * 2**20, 1.0


async def read_body(request: Request, max_bytes: int, patience: float) -> bytes:
    """The request's body. HttpError for what is not JSON, too large, or comes too slowly (seconds a piece)."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also a matter of security: no page of another site can send this type here without asking first.
    if media != "application/json":
        raise HttpError(415, f"content-type {media[:100]!r} is not served; use application/json", is_unread=True)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "content-encoding is not served; send the body as it is", is_unread=True)
    too_large = HttpError(413, f"the body is larger than {max_bytes} bytes; send less", is_unread=True)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body, has_more = bytearray(), True
    while has_more:
        try:
            async with asyncio.timeout(patience):
                part = await request.receive()
        except TimeoutError:
            raise HttpError(
                408, f"nothing of the body came for {patience:g} s; send it faster", is_unread=True
            ) from None
        if part["type"] == "http.disconnect":
            raise ClientDisconnect
        body += part.get("body", b"")
        has_more = part.get("more_body", False)
        if len(body) > max_bytes:
            too_large.is_unread = has_more
            raise too_large
    return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and stop it where the client goes away first: ClientDisconnect. The body must have been read."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(until_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_done = working.done()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))
    if not is_done:
        raise ClientDisconnect
    working.result()


async def discard_rest(receive: Receive) -> None:
    """Read what still comes of a body, within limits: closing on unread bytes would take the answer from the client."""
    num_bytes = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while num_bytes < _DISCARD_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def until_gone(receive: Receive) -> None:
    """Until the client has disconnected. What it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass
