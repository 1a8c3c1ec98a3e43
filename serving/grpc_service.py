"""The services of protos/jaxinfer/v1 over grpc.aio. Imports no jax."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from grpc.aio import EOF  # pyright: ignore[reportAttributeAccessIssue]

from jaxinfer.types import MAX_LOGPROBS
from serving import messages
from serving.engine_loop import stalled
from serving.errors import RequestError
from serving.frontend import Frontend
from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc, models_pb2, models_pb2_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext

SERVICES = ("jaxinfer.v1.Inference", "jaxinfer.v1.Models")
_DEFECT = "the server has a defect; its log says where"
PUSHBACK = "grpc-retry-pushback-ms"  # the metadata by which gRPC clients are told when to try again


def _answered(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """RequestErrors become statuses; whatever else is raised is a defect of ours, logged and called INTERNAL."""

    @functools.wraps(method)
    async def answer(self: Any, request: Any, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except RequestError as error:
            await _abort(context, error, self.frontend.limits.stall_seconds)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("%s failed on request_id=%r", method.__name__, getattr(request, "request_id", ""))
            internal = RequestError("INTERNAL", _DEFECT)
            await _abort(context, internal, self.frontend.limits.stall_seconds)

    return answer


async def _abort(context: Context, error: RequestError, patience: float) -> NoReturn:
    metadata = ()
    if error.retry_after is not None:
        metadata = ((PUSHBACK, str(round(error.retry_after * 1000))),)
    # What a stalled reader has not read stands before the status; it is not waited for.
    with suppress(TimeoutError):
        async with asyncio.timeout(min(patience, 1.0)):
            await context.abort(getattr(grpc.StatusCode, error.code), error.message, metadata)
    raise asyncio.CancelledError


@dataclass(frozen=True)
class _Answer:
    """One message of an answer. error: why the request is not complete; only the last message has it."""

    response: pb.GenerateResponse
    is_last: bool
    error: RequestError | None


class _Service:
    def __init__(self, frontend: Frontend) -> None:
        self.frontend = frontend


class Inference(_Service, inference_pb2_grpc.InferenceServicer):
    """Generate, GenerateStream, GenerateMany."""

    @_answered
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with aclosing(self._answers(request, is_streamed=False)) as answers:
            answer = await anext(answers)
        if answer.error is not None:
            raise answer.error
        return answer.response

    @_answered
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with aclosing(self._answers(request, is_streamed=True)) as answers:
            async for answer in answers:
                await self._write(context, answer.response)
                if answer.error is not None:
                    raise answer.error

    @_answered
    async def GenerateMany(self, requests: AsyncIterator[pb.GenerateManyRequest], context: Context) -> None:
        # Short: while it is full, the items' own streams merge what comes.
        out: asyncio.Queue[pb.GenerateManyResponse | None] = asyncio.Queue(16)
        reader = asyncio.create_task(self._read_items(context, out))
        try:
            while (message := await out.get()) is not None:
                await self._write(context, message)
            await reader
        finally:
            reader.cancel()
            await asyncio.wait((reader,))

    async def _read_items(self, context: Context, out: asyncio.Queue[pb.GenerateManyResponse | None]) -> None:
        """Work on what the client sends, at most max_items_in_flight at a time; its sends wait otherwise.

        RequestError where the server shuts down before the client has sent everything.
        """
        places = asyncio.Semaphore(self.frontend.limits.max_items_in_flight)

        async def work(number: int, message: pb.GenerateManyRequest) -> None:
            try:
                async with aclosing(self._item(number, message)) as responses:
                    async for response in responses:
                        await out.put(response)
            finally:
                places.release()

        draining = asyncio.create_task(self.frontend.draining.wait())
        drained = False
        try:
            async with asyncio.TaskGroup() as items:
                for number in itertools.count():
                    await places.acquire()
                    coming = asyncio.create_task(context.read())
                    try:
                        await asyncio.wait((coming, draining), return_when=asyncio.FIRST_COMPLETED)
                        if drained := not coming.done():
                            break
                    finally:
                        coming.cancel()
                    message = coming.result()
                    if message is EOF:
                        break
                    items.create_task(work(number, message))
        except Exception:
            await out.put(None)
            raise
        finally:
            draining.cancel()
        await out.put(None)
        if drained:
            raise RequestError("UNAVAILABLE", "the server is shutting down; send what has no status elsewhere", 1.0)

    async def _item(
        self, number: int, message: pb.GenerateManyRequest
    ) -> AsyncGenerator[pb.GenerateManyResponse, None]:
        """An item's messages; whatever becomes of it, the last has its status, and the call goes on."""
        try:
            messages.refuse_unknown(message)
            async with aclosing(self._answers(message.request, message.stream)) as answers:
                async for answer in answers:
                    response = pb.GenerateManyResponse(item=number, response=answer.response)
                    if answer.is_last:
                        response.status.CopyFrom(_item_status(answer.error))
                    yield response
        except RequestError as error:
            yield pb.GenerateManyResponse(item=number, status=_item_status(error))
        except Exception:
            log.exception("item %d failed, request_id=%r", number, message.request.request_id)
            internal = RequestError("INTERNAL", _DEFECT)
            yield pb.GenerateManyResponse(item=number, status=_item_status(internal))

    async def _answers(self, request: pb.GenerateRequest, is_streamed: bool) -> AsyncGenerator[_Answer, None]:
        """The messages of one request, as they come or all in one. RequestError where it is refused."""
        frontend = self.frontend
        with frontend.counting_refusals():
            ask = messages.read_ask(request)
        stream = await frontend.submit(ask, is_streamed=is_streamed)
        async with stream:
            writer = messages.Writer(
                request_id=request.request_id or stream.request.request_id,
                model=frontend.facts.name,
                options=request.output,
            )
            delta = await stream.next()
            for seq in itertools.count():
                while not is_streamed and delta.end is None:
                    delta.add(await stream.next())
                error = None if delta.end is None else delta.end.error
                if error is not None and error.code == "INTERNAL":
                    log.error("request_id=%r: %s", writer.request_id, error.message)
                yield _Answer(writer.response(delta, seq), delta.end is not None, error)
                if delta.end is not None:
                    return
                delta = await stream.next()

    async def _write(self, context: Context, message: Any) -> None:
        """Send a message. RequestError where the reader leaves what came before unread for too long."""
        seconds = self.frontend.limits.stall_seconds
        try:
            async with asyncio.timeout(seconds):
                await context.write(message)
        except TimeoutError:
            raise stalled(f"took nothing for {seconds:g} s") from None


class Models(_Service, models_pb2_grpc.ModelsServicer):
    """What is loaded, and its tokenizer."""

    @_answered
    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        self.frontend.check_model(None)
        return models_pb2.ListModelsResponse(models=[self._info()])

    @_answered
    async def GetModel(self, request: models_pb2.GetModelRequest, context: Context) -> models_pb2.ModelInfo:
        self.frontend.check_model(request.model)
        return self._info()

    @_answered
    async def Tokenize(self, request: models_pb2.TokenizeRequest, context: Context) -> models_pb2.TokenizeResponse:
        self.frontend.check_model(request.model)
        messages.refuse_unknown(request)
        kind = request.WhichOneof("input")
        if kind is None:
            raise RequestError("INVALID_ARGUMENT", "the input is missing; set text or chat")
        if kind == "chat" and request.HasField("add_special_tokens"):
            raise RequestError("INVALID_ARGUMENT", "add_special_tokens goes with text; a chat template adds its own")
        prompt = messages.read_chat(request.chat) if kind == "chat" else request.text
        add_special_tokens = request.add_special_tokens or not request.HasField("add_special_tokens")
        token_ids = await self.frontend.token_ids(prompt, add_special_tokens)
        return models_pb2.TokenizeResponse(token_ids=token_ids)

    @_answered
    async def Detokenize(
        self, request: models_pb2.DetokenizeRequest, context: Context
    ) -> models_pb2.DetokenizeResponse:
        self.frontend.check_model(request.model)
        messages.refuse_unknown(request)
        text = await self.frontend.text_of(tuple(request.token_ids), request.skip_special_tokens)
        return models_pb2.DetokenizeResponse(text=messages.sendable(text))

    def _info(self) -> models_pb2.ModelInfo:
        frontend, facts = self.frontend, self.frontend.facts
        tokenizer = frontend.tokenizer
        return models_pb2.ModelInfo(
            name=facts.name,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            dtype=facts.dtype,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
            end_token_ids=facts.eos_token_ids,
            max_n=frontend.limits.max_n or facts.max_num_seqs,
            max_logprobs=MAX_LOGPROBS,
        )


def _item_status(error: RequestError | None) -> pb.ItemStatus:
    if error is None:
        return pb.ItemStatus(code=0)
    retry_after = None if error.retry_after is None else round(error.retry_after * 1000)
    code = getattr(grpc.StatusCode, error.code).value[0]
    return pb.ItemStatus(code=code, message=error.message, retry_after_ms=retry_after)
