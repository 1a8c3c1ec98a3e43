"""The services of protos/jaxinfer/v1 over grpc.aio. Imports no jax."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from jaxinfer.types import MAX_LOGPROBS
from serving import messages
from serving.calls import DEFECT, Context, Service, answered
from serving.errors import RequestError
from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc, models_pb2, models_pb2_grpc

log = logging.getLogger(__name__)

SERVICES = ("jaxinfer.v1.Inference", "jaxinfer.v1.Models")


@dataclass(frozen=True)
class _Answer:
    """One message of an answer. error: why the request is not complete; only the last message has it."""

    response: pb.GenerateResponse
    is_last: bool
    error: RequestError | None


class Inference(Service, inference_pb2_grpc.InferenceServicer):
    """Generate, GenerateStream, GenerateMany."""

    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        async with aclosing(self._answers(request, is_streamed=False)) as answers:
            answer = await anext(answers)
        if answer.error is not None:
            raise answer.error
        return answer.response

    @answered
    async def GenerateStream(self, request: pb.GenerateRequest, context: Context) -> None:
        async with aclosing(self._answers(request, is_streamed=True)) as answers:
            async for answer in answers:
                await self.write(context, answer.response)
                if answer.error is not None:
                    raise answer.error

    @answered
    async def GenerateMany(self, requests: AsyncIterator[pb.GenerateManyRequest], context: Context) -> None:
        await self.serve_items(context, self._item)

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
            internal = RequestError("INTERNAL", DEFECT)
            yield pb.GenerateManyResponse(item=number, status=_item_status(internal))

    async def _answers(self, request: pb.GenerateRequest, is_streamed: bool) -> AsyncGenerator[_Answer, None]:
        """The messages of one request, as they come or all in one. RequestError where it is refused."""
        frontend = self.frontend
        with frontend.counting_refusals():
            ask = await frontend.understand(request.ByteSize(), lambda: messages.read_ask(request))
        stream = await frontend.submit(ask, is_streamed=is_streamed)
        async with stream:
            writer = messages.Writer(
                request_id=stream.name,
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


class Models(Service, models_pb2_grpc.ModelsServicer):
    """What is loaded, and its tokenizer."""

    @answered
    async def ListModels(
        self, request: models_pb2.ListModelsRequest, context: Context
    ) -> models_pb2.ListModelsResponse:
        self.frontend.check_model(None)
        return models_pb2.ListModelsResponse(models=[self._info()])

    @answered
    async def GetModel(self, request: models_pb2.GetModelRequest, context: Context) -> models_pb2.ModelInfo:
        self.frontend.check_model(request.model)
        return self._info()

    @answered
    async def Tokenize(self, request: models_pb2.TokenizeRequest, context: Context) -> models_pb2.TokenizeResponse:
        frontend = self.frontend
        with frontend.counting_refusals():
            frontend.check_model(request.model)
            prompt = await frontend.understand(request.ByteSize(), lambda: messages.read_tokenize(request))
            add_special_tokens = request.add_special_tokens or not request.HasField("add_special_tokens")
            token_ids = await frontend.token_ids(prompt, add_special_tokens)
        return models_pb2.TokenizeResponse(token_ids=token_ids)

    @answered
    async def Detokenize(
        self, request: models_pb2.DetokenizeRequest, context: Context
    ) -> models_pb2.DetokenizeResponse:
        with self.frontend.counting_refusals():
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
