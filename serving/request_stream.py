"""One request's answer on its way from the engine's thread to its reader. Imports no jax."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxinfer.types import Request
from serving.admission import Ticket
from serving.deltas import Delta, End
from serving.errors import RequestError

if TYPE_CHECKING:
    from serving.engine_loop import EngineLoop


class RequestStream:
    """One request's answer on its way to its reader; for the event loop only. Use as an async context manager.

    Leaving the context before the end aborts the request. max_unread_tokens: more than this unread aborts it too; None
    is a reader who wants everything at once.
    name: the request's in the words of its client, not of the engine; several may have one.
    on_end: called once it is over, with how it ended, or with the error for a request that the engine did not take.
    """

    def __init__(
        self,
        request: Request,
        ticket: Ticket,
        max_unread_tokens: int | None,
        engine: EngineLoop,
        name: str,
        on_end: Callable[[End | RequestError], None],
    ) -> None:
        self.request = request
        self.name = name
        self.is_running = False
        self._on_end = on_end
        self._ticket = ticket
        self._max_unread_tokens = max_unread_tokens
        self._engine = engine
        self._unread: Delta | None = None
        self._refusal: RequestError | None = None
        self._reason: RequestError | None = None
        self._arrived = asyncio.Event()
        self._over = False

    @property
    def is_streamed(self) -> bool:
        """Whether its reader is given what there is as it comes, and not only at the end."""
        return self._max_unread_tokens is not None

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.cancel(error if isinstance(error, RequestError) else None)

    async def next(self) -> Delta:
        """All that has come since the last call, at least something; the last has `end`. RequestError if refused."""
        while self._unread is None:
            if self._refusal is not None:
                raise self._refusal
            assert not self._over, "nothing comes after the end"
            self._arrived.clear()
            await self._arrived.wait()
        delta, self._unread = self._unread, None
        return delta

    def cancel(self, reason: RequestError | None) -> None:
        """Abort the request if it still runs. reason: what its reader is told, if there still is one."""
        if not self._over and self._reason is None:
            self._reason = reason
            self._engine.abort(self.request.request_id)

    # Called on the event loop with what the engine's thread sent.

    def started(self, _: None) -> None:
        self.is_running = True
        self._ticket.started()

    def give(self, delta: Delta) -> None:
        if self._over:  # a thread that was given up goes on after all
            return
        if self._unread is None:
            self._unread = delta
        else:
            self._unread.add(delta)
        if delta.end is not None:
            if self._reason is not None and delta.end.error is None:
                delta.end.error = self._reason
            self._end(delta.end)
        elif self._max_unread_tokens is not None and self._unread.num_tokens > self._max_unread_tokens:
            self.cancel(stalled(f"left {self._unread.num_tokens} tokens unread"))
        self._arrived.set()

    def refuse(self, error: RequestError) -> None:
        if self._over:
            return
        self._refusal = error
        self._end(error)
        self._arrived.set()

    def _end(self, how: End | RequestError) -> None:
        self._over = True
        self._ticket.leave()
        self._engine.forget(self)
        self._on_end(how)


def stalled(what: str) -> RequestError:
    return RequestError("ABORTED", f"the reader {what}; read faster, or ask for less")
