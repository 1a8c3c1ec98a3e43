"""A typed client of the gRPC service, asyncio and plain. Imports no jax.

    with Client("localhost:50051") as client:
        print(client.generate("def mean(values):", max_tokens=32).text)

Prompts are text, token ids or chat messages (dicts with "role" and "content"). Keyword arguments are the fields of the
protocol's Sampling, Stopping and OutputOptions messages, and request_id, model, priority, queue_time_limit_ms and
cache_salt. A deadline covers all tries. What the server refused (RESOURCE_EXHAUSTED, UNAVAILABLE) is tried again, after
the pause that the server advises; a stream that has given something is never begun again. Other failures, and the last
of several, raise grpc.RpcError with its code() and details().
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc, models_pb2, models_pb2_grpc

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

_PUSHBACK = "grpc-retry-pushback-ms"
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_PARTS = {"sampling": pb.Sampling, "stopping": pb.Stopping, "output": pb.OutputOptions}
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # retries are made here, where it is known what is safe
]


@dataclass(frozen=True)
class Connection:
    """Where the server is and how to speak to it. tls: True, or the file of the CA that signed its certificate.

    certificate, key: the client's own, for mutual TLS. timeout: seconds for a call with all its tries; None waits.
    max_tries: of what the server refused.
    """

    address: str
    token: str | None = None
    tls: bool | str = False
    certificate: str | None = None
    key: str | None = None
    timeout: float | None = None
    max_tries: int = 4

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a connection in the clear. OSError for files that cannot be read."""
        if not self.tls:
            if self.certificate is not None:
                raise ValueError("certificate is given but tls is off; set tls=True or to the server's CA file")
            return None
        ca = None if self.tls is True else Path(self.tls).read_bytes()
        pair = [None if name is None else Path(name).read_bytes() for name in (self.key, self.certificate)]
        return grpc.ssl_channel_credentials(ca, *pair)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


@dataclass
class Completion:
    """One of a prompt's n completions. `finish` is None while it goes on."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finish: pb.Finish | None = None

    @property
    def finish_reason(self) -> str | None:
        """stop, length, aborted, time_limit or error."""
        if self.finish is None:
            return None
        return pb.FinishReason.Name(self.finish.reason).removeprefix("FINISH_REASON_").lower()


@dataclass
class Generation:
    """An answer, whole or as far as it has come."""

    request_id: str = ""
    completions: list[Completion] = field(default_factory=list)
    prompt: pb.PromptInfo | None = None
    usage: pb.Usage | None = None
    timings: pb.Timings | None = None

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text if self.completions else ""

    def add(self, response: pb.GenerateResponse) -> Generation:
        """Take in the next message."""
        self.request_id = response.request_id
        if response.HasField("prompt"):
            self.prompt = response.prompt
        for delta in response.sequences:
            while len(self.completions) <= delta.index:
                self.completions.append(Completion())
            known = self.completions[delta.index]
            known.text += delta.text
            known.token_ids += delta.token_ids
            known.logprobs += delta.logprobs
            if delta.HasField("finish"):
                known.finish = delta.finish
        if response.HasField("usage"):
            self.usage, self.timings = response.usage, response.timings
        return self


@dataclass(frozen=True)
class Failure:
    """An item of generate_many that was not answered: the name of its status, and why."""

    code: str
    message: str
    retry_after: float | None = None


def make_request(prompt: Prompt, **fields: Any) -> pb.GenerateRequest:
    """A request from a prompt and the protocol's fields by name. ValueError for a name that it does not have."""
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        messages = [part for part in prompt if isinstance(part, Mapping)]
        token_ids = [part for part in prompt if not isinstance(part, Mapping)]
        if messages and token_ids:
            raise ValueError(f"the prompt mixes messages with {token_ids[0]!r}; give token ids or messages")
        if messages:
            request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
        else:
            request.token_ids.ids.extend(token_ids)
    for name, value in fields.items():
        if value is None:
            continue
        if name == "stop" and isinstance(value, str):
            value = [value]
        homes = [part for part, kind in _PARTS.items() if name in kind.DESCRIPTOR.fields_by_name]
        if homes:
            getattr(request, homes[0]).MergeFrom(_PARTS[homes[0]](**{name: value}))
        elif name in pb.GenerateRequest.DESCRIPTOR.fields_by_name and name not in (
            "text",
            "token_ids",
            "chat",
            *_PARTS,
        ):
            setattr(request, name, value)
        else:
            raise ValueError(f"{name}={value!r} is no field of a request; see protos/jaxinfer/v1/inference.proto")
    return request


class _Tries:
    """When to try again, and until when."""

    def __init__(self, connection: Connection, timeout: float | None) -> None:
        timeout = connection.timeout if timeout is None else timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._max_tries = connection.max_tries
        self._num_tries = 0

    @property
    def timeout(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.001)

    def pause(self, error: Any) -> float:
        """Seconds to wait before the next try; raises the error where there is none."""
        self._num_tries += 1
        if error.code() not in _RETRIED or self._num_tries >= self._max_tries:
            raise error
        advice = [value for key, value in error.trailing_metadata() or () if key == _PUSHBACK]
        if advice:
            seconds = int(advice[0]) / 1000
        else:
            seconds = random.uniform(0.5, 1) * min(_FIRST_PAUSE * 2 ** min(self._num_tries, 10), _LONGEST_PAUSE)
        left = self.timeout
        if left is not None and seconds >= left:
            raise error
        return seconds


def _outcome(message: pb.GenerateManyResponse, known: Generation) -> Generation | Failure:
    status = message.status
    if not status.code:
        return known
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    retry_after = status.retry_after_ms / 1000 if status.HasField("retry_after_ms") else None
    return Failure(names.get(status.code, str(status.code)), status.message, retry_after)


class Client:
    """For programs without an event loop; may be shared by threads. Arguments are Connection's."""

    def __init__(self, address: str, **connection: Any) -> None:
        self.connection = Connection(address, **connection)
        credentials = self.connection.credentials()
        self._channel = (
            grpc.insecure_channel(address, _OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, _OPTIONS)
        )
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._models = models_pb2_grpc.ModelsStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **fields: Any) -> Generation:
        """The whole answer."""
        return Generation().add(self._call(self._inference.Generate, make_request(prompt, **fields), timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **fields: Any) -> Iterator[pb.GenerateResponse]:
        """The answer as it grows; `Generation().add` puts it together. Closing the iterator ends the request."""
        request, tries = make_request(prompt, **fields), _Tries(self.connection, timeout)
        while True:
            call: Any = self._inference.GenerateStream(
                request, timeout=tries.timeout, metadata=self.connection.metadata
            )
            has_given = False
            try:
                for response in call:
                    has_given = True
                    yield response
                return
            except grpc.RpcError as error:
                if has_given:
                    raise
                pause = tries.pause(error)
            finally:
                call.cancel()
            time.sleep(pause)

    def generate_many(
        self, requests: Iterable[pb.GenerateRequest], *, timeout: float | None = None
    ) -> Iterator[tuple[int, Generation | Failure]]:
        """(number, answer) of many requests (see make_request), as they finish."""
        items = (pb.GenerateManyRequest(request=request) for request in requests)
        timeout = self.connection.timeout if timeout is None else timeout
        call: Any = self._inference.GenerateMany(items, timeout=timeout, metadata=self.connection.metadata)
        try:
            for message in call:
                if message.HasField("status"):
                    yield message.item, _outcome(message, Generation().add(message.response))
        finally:
            call.cancel()

    def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        return list(self._call(self._models.ListModels, models_pb2.ListModelsRequest(), timeout).models)

    def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        return list(self._call(self._models.Tokenize, models_pb2.TokenizeRequest(text=text), timeout).token_ids)

    def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None) -> str:
        request = models_pb2.DetokenizeRequest(token_ids=token_ids)
        return self._call(self._models.Detokenize, request, timeout).text

    def is_serving(self, *, timeout: float | None = 5.0) -> bool:
        request = health_pb2.HealthCheckRequest()
        answer = self._health.Check(request, timeout=timeout, metadata=self.connection.metadata)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        tries = _Tries(self.connection, timeout)
        while True:
            try:
                return method(request, timeout=tries.timeout, metadata=self.connection.metadata)
            except grpc.RpcError as error:
                pause = tries.pause(error)
            time.sleep(pause)


class AsyncClient:
    """The same for asyncio; belongs to one event loop. Arguments are Connection's."""

    def __init__(self, address: str, **connection: Any) -> None:
        self.connection = Connection(address, **connection)
        credentials = self.connection.credentials()
        self._channel = (
            grpc.aio.insecure_channel(address, _OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, _OPTIONS)
        )
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._models = models_pb2_grpc.ModelsStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def generate(self, prompt: Prompt, *, timeout: float | None = None, **fields: Any) -> Generation:
        """The whole answer."""
        return Generation().add(await self._call(self._inference.Generate, make_request(prompt, **fields), timeout))

    async def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **fields: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """The answer as it grows; `Generation().add` puts it together. Closing the iterator ends the request."""
        request, tries = make_request(prompt, **fields), _Tries(self.connection, timeout)
        while True:
            call: Any = self._inference.GenerateStream(
                request, timeout=tries.timeout, metadata=self.connection.metadata
            )
            has_given = False
            try:
                async for response in call:
                    has_given = True
                    yield response
                return
            except grpc.RpcError as error:
                if has_given:
                    raise
                pause = tries.pause(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause)

    async def generate_many(
        self, requests: Iterable[pb.GenerateRequest], *, timeout: float | None = None
    ) -> AsyncIterator[tuple[int, Generation | Failure]]:
        """(number, answer) of many requests (see make_request), as they finish."""
        items = (pb.GenerateManyRequest(request=request) for request in requests)
        timeout = self.connection.timeout if timeout is None else timeout
        call: Any = self._inference.GenerateMany(items, timeout=timeout, metadata=self.connection.metadata)
        try:
            async for message in call:
                if message.HasField("status"):
                    yield message.item, _outcome(message, Generation().add(message.response))
        finally:
            call.cancel()

    async def models(self, *, timeout: float | None = None) -> list[models_pb2.ModelInfo]:
        return list((await self._call(self._models.ListModels, models_pb2.ListModelsRequest(), timeout)).models)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> list[int]:
        answer = await self._call(self._models.Tokenize, models_pb2.TokenizeRequest(text=text), timeout)
        return list(answer.token_ids)

    async def detokenize(self, token_ids: Iterable[int], *, timeout: float | None = None) -> str:
        request = models_pb2.DetokenizeRequest(token_ids=token_ids)
        return (await self._call(self._models.Detokenize, request, timeout)).text

    async def is_serving(self, *, timeout: float | None = 5.0) -> bool:
        request = health_pb2.HealthCheckRequest()
        answer = await self._health.Check(request, timeout=timeout, metadata=self.connection.metadata)
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        tries = _Tries(self.connection, timeout)
        while True:
            try:
                return await method(request, timeout=tries.timeout, metadata=self.connection.metadata)
            except grpc.RpcError as error:
                pause = tries.pause(error)
            await asyncio.sleep(pause)
