"""What every gRPC service here shares: errors as statuses, writes that do not wait for ever, many requests on one call.

Imports no jax.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc.aio import EOF  # pyright: ignore[reportAttributeAccessIssue]

from serving.errors import RequestError
from serving.frontend import Frontend
from serving.refusals import Refusals
from serving.request_stream import stalled
from serving.tracing import note_caller

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext

DEFECT = "the server has a defect; its log says where"
PUSHBACK = "grpc-retry-pushback-ms"  # the metadata by which gRPC clients are told when to try again


class Service:
    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend

    async def write(self, context: Context, message: Any) -> None:
        """Send a message. RequestError where the reader leaves what came before unread for too long."""
        seconds = self.frontend.limits.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(message)
        except TimeoutError:
            raise stalled(f"took nothing for {seconds:g} s") from None

    async def serve_items(self, context: Context, answers: Callable[[int, Any], AsyncGenerator[Any, None]]) -> None:
        """Answer the requests of one call, each by `answers(number, request)`, whose messages are sent as they come.

        At most max_items_in_flight are worked on at a time; the client's sends wait otherwise. `answers` raises
        nothing. RequestError where the server shuts down before the client has sent everything, or a message is none.
        """
        # Short: while it is full, the items' own streams merge what comes.
        out: asyncio.Queue[Any] = asyncio.Queue(16)
        reader = asyncio.create_task(self._read_items(context, answers, out))
        try:
            while (message := await out.get()) is not None:
                await self.write(context, message)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait((reader,))

    async def _read_items(
        self, context: Context, answers: Callable[[int, Any], AsyncGenerator[Any, None]], out: asyncio.Queue[Any]
    ) -> None:
        places = asyncio.Semaphore(self.frontend.limits.max_items_in_flight)

        async def work(number: int, message: Any) -> None:
            try:
                async with aclosing(answers(number, message)) as responses:
                    async for response in responses:
                        await out.put(response)
            finally:
                places.release()

        draining = asyncio.create_task(self.frontend.draining.wait())
        refusal = None
        try:
            async with asyncio.TaskGroup() as items:
                for number in itertools.count():
                    await places.acquire()
                    coming = asyncio.create_task(context.read())
                    try:
                        await asyncio.wait((coming, draining), return_when=asyncio.FIRST_COMPLETED)
                        if not coming.done():
                            refusal = _shutting_down()
                            break
                    finally:
                        coming.cancel()
                    try:
                        message = coming.result()
                    except DecodeError as error:
                        refusal = RequestError("INVALID_ARGUMENT", f"message {number} cannot be read: {error}")
                        break
                    if message is EOF:
                        break
                    items.create_task(work(number, message))
        except Exception:
            await out.put(None)
            raise
        finally:
            draining.cancel()
        await out.put(None)
        if refusal is not None:
            raise refusal


def _shutting_down() -> RequestError:
    return RequestError("UNAVAILABLE", "the server is shutting down; send what has no status elsewhere", 1.0)


class CallerNote(grpc.aio.ServerInterceptor):
    """Remembers the trace that a call belongs to."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Called by gRPC before each call, in its task."""
        details: Any = handler_call_details
        note_caller(details.invocation_metadata)
        return await continuation(handler_call_details)


class MessageCheck(grpc.aio.ServerInterceptor):
    """INVALID_ARGUMENT for a call's only message if it is none of this protocol; gRPC itself would say INTERNAL."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by gRPC before each call. None where nothing here has the method."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        make, answer = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        if handler.response_streaming:
            make, answer = grpc.unary_stream_rpc_method_handler, handler.unary_stream

        async def checked(raw: bytes, context: Context) -> Any:
            try:
                request = handler.request_deserializer(raw)
            except DecodeError as error:
                unreadable = RequestError("INVALID_ARGUMENT", f"the message cannot be read: {error}")
                self._refusals.note(unreadable.code, unreadable.message, caller=context.peer())
                await abort_call(context, unreadable, patience=1.0)
            return await answer(request, context)

        return make(checked, request_deserializer=None, response_serializer=handler.response_serializer)


def answered(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """RequestErrors become statuses; whatever else is raised is a defect of ours, logged and called INTERNAL."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Context) -> Any:
        try:
            with self.frontend.open_call():
                return await method(self, request, context)
        except RequestError as error:
            await abort_call(context, error, self.frontend.limits.stall_seconds)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # what a write says of a call that is over, if nothing has been cancelled yet
            over = RequestError("ABORTED", "the call was over before its answer")
            await abort_call(context, over, self.frontend.limits.stall_seconds)
        except Exception:
            log.exception("%s failed on request_id=%r", method.__name__, getattr(request, "request_id", ""))
            internal = RequestError("INTERNAL", DEFECT)
            await abort_call(context, internal, self.frontend.limits.stall_seconds)

    return answer


async def abort_call(context: Context, error: RequestError, patience: float) -> NoReturn:
    """End a call with the error's status."""
    metadata = ()
    if error.retry_after is not None:
        metadata = ((PUSHBACK, str(round(error.retry_after * 1000))),)
    # What a stalled reader has not read stands before the status; it is not waited for. InternalError: it is over.
    with suppress(TimeoutError, grpc.aio.InternalError):
        async with asyncio.timeout(min(patience, 1.0)):
            await context.abort(getattr(grpc.StatusCode, error.code), error.message, metadata)
    raise asyncio.CancelledError
