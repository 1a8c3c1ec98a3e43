"""Mutated messages on every method: none brings the server down, and none is called a defect of ours.

A run tries a share of what FUZZ_MESSAGES=10000 would: enough to notice a careless change, and quick.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from jaxinfer.engine import Engine
from serving.client import make_request
from serving.control import ControlConfig
from serving.generated import control_pb2, models_pb2
from serving.generated import inference_pb2 as pb
from serving.generated import open_inference_pb2 as oi
from serving.settings import Limits
from tests.serving.harness import connected, run

NUM_MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "3000"))
AT_A_TIME = 32
SECONDS = 0.5  # a message that asks for much need not get it: the next one is worth more
WHOLE = (0, 1, 2, 7, 95, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1)
REAL = (0.0, 0.5, 1.0, -0.5, 1e30, float("nan"), float("inf"))
TEXTS = ("", "x", "small", "a prompt", "\x00", "é" * 50, "x" * 3000, "{", '{"max_tokens": 2}')
# What a client's mistake or the load may be called; UNKNOWN and INTERNAL are what we would be blamed for.
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED"}


async def read_all(call: Any) -> None:
    """An answer that nobody reads has no end."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


def open_inference() -> oi.ModelInferRequest:
    request = oi.ModelInferRequest(model_name="small", id="fuzz")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    for content in (b"a prompt", b'{"max_tokens": 3, "temperature": "0.5", "stop": ["x"]}'):
        request.raw_input_contents.append(len(content).to_bytes(4, "little") + content)
    request.parameters["timeout"].int64_param = 10_000_000
    request.outputs.add(name="text_output")
    return request


def seeds() -> list[tuple[str, Message]]:
    """A good message of every method, by its path."""
    plain = make_request("a prompt", max_tokens=3, stop=["x"], logit_bias={5: 1.0}, logprobs=1, seed=7)
    chat = make_request([{"role": "user", "content": "hello"}], max_tokens=3, n=2, top_p=0.5)
    chat.chat.template_arguments.update({"opening": "so", "more": [1, {"a": None}]})
    ids = make_request([5, 6, 7], max_tokens=2, priority=1, queue_time_limit_ms=5000, cache_salt="s", request_id="r")
    typed = open_inference()
    typed.ClearField("raw_input_contents")
    for tensor, content in zip(typed.inputs, (b"a prompt", b'{"max_tokens": 3}'), strict=True):
        tensor.contents.bytes_contents.append(content)
    messages: dict[str, list[Any]] = {
        "/jaxinfer.v1.Inference/Generate": [plain, chat, ids],
        "/jaxinfer.v1.Inference/GenerateStream": [plain, chat, ids],
        "/jaxinfer.v1.Inference/GenerateMany": [
            pb.GenerateManyRequest(request=own, stream=True) for own in (plain, ids)
        ],
        "/jaxinfer.v1.Models/GetModel": [models_pb2.GetModelRequest(model="small")],
        "/jaxinfer.v1.Models/Tokenize": [models_pb2.TokenizeRequest(text="some text", add_special_tokens=True)],
        "/jaxinfer.v1.Models/Detokenize": [models_pb2.DetokenizeRequest(token_ids=[5, 6], skip_special_tokens=True)],
        "/inference.GRPCInferenceService/ModelInfer": [open_inference(), typed],
        "/inference.GRPCInferenceService/ModelStreamInfer": [open_inference(), typed],
        "/inference.GRPCInferenceService/ModelMetadata": [oi.ModelMetadataRequest(name="small", version="1")],
        "/inference.GRPCInferenceService/ModelReady": [oi.ModelReadyRequest(name="small", version="1")],
        "/grpc.health.v1.Health/Check": [health_pb2.HealthCheckRequest(service="jaxinfer.v1.Inference")],
        "/jaxinfer.v1.Control/Abort": [control_pb2.AbortRequest(request_id="r")],
        "/jaxinfer.v1.Control/Load": [control_pb2.LoadRequest(path="../x")],
    }
    return [(path, own) for path, several in messages.items() for own in several]


def mutated(rng: random.Random, message: Message, other: Message) -> bytes:
    """A message changed in a field or two, which a server can read, or in its bytes, which it often cannot."""
    if rng.random() < 0.3:
        return garbled(rng, message.SerializeToString(), other.SerializeToString())
    own = type(message).FromString(message.SerializeToString())
    for _ in range(rng.randint(1, 2)):
        change(rng, rng.choice(list(messages_in(own))))
    return own.SerializeToString()


def messages_in(message: Message) -> Iterator[Message]:
    """The message and those that it holds, but for the values of maps."""
    yield message
    for field, value in message.ListFields():
        if isinstance(value, Message):
            yield from messages_in(value)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for inner in value:
                yield from messages_in(inner)


def change(rng: random.Random, message: Message) -> None:
    """Another value for one field of the message, or none."""
    field = rng.choice(message.DESCRIPTOR.fields)
    value: Any = rng.choice(WHOLE)
    if field.message_type is not None or rng.random() < 0.1:
        message.ClearField(field.name)
        return
    if field.type == field.TYPE_BYTES:
        value = rng.choice(TEXTS).encode()
    elif field.cpp_type == field.CPPTYPE_STRING:
        value = rng.choice(TEXTS)
    elif field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        value = rng.choice(REAL)
    elif field.cpp_type == field.CPPTYPE_BOOL:
        value = rng.random() < 0.5
    with contextlib.suppress(ValueError):  # a number that the field does not hold
        if field.is_repeated:
            getattr(message, field.name).extend([value] * rng.choice((1, 2, 70)))
        else:
            setattr(message, field.name, value)


def garbled(rng: random.Random, message: bytes, other: bytes) -> bytes:
    """One to four changes: bits, bytes, cuts, repeats, a piece of another message, a large number."""
    raw = bytearray(message)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(7):
            case 0 if raw:
                raw[at % len(raw)] ^= 1 << rng.randrange(8)
            case 1 if raw:
                raw[at % len(raw)] = rng.randrange(256)
            case 2:
                del raw[at:]
            case 3:
                del raw[at : at + rng.randint(1, 8)]
            case 4:
                raw[at:at] = raw[at : at + rng.randint(1, 16)] * rng.randint(1, 3)
            case 5:
                start = rng.randrange(len(other) + 1)
                raw[at:at] = other[start : start + rng.randint(1, 24)]
            case _:
                raw[at:at] = rng.choice((b"\xff" * 9 + b"\x01", b"\x00\x00\xc0\x7f", b"\xed\xa0\x80", b"\x80"))
    return bytes(raw)


@pytest.mark.parametrize("seed", [0])
def test_mutated_messages(engine: Engine, seed: int) -> None:
    rng, good = random.Random(seed), seeds()
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    defects: list[str] = []

    async def send(channels: dict[str, grpc.aio.Channel], path: str, raw: bytes) -> None:
        channel = channels["control" if "Control" in path else "main"]
        if path.endswith(("GenerateMany", "StreamInfer")):
            call: Any = channel.stream_stream(path)(timeout=SECONDS)
            with contextlib.suppress(
                grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError
            ):  # it may be over by now
                await call.write(raw)
                await call.done_writing()
            await read_all(call)
        elif path.endswith("GenerateStream"):
            call = channel.unary_stream(path)(raw, timeout=SECONDS)
            await read_all(call)
        else:
            call = channel.unary_unary(path)(raw, timeout=SECONDS)
        code = (await call.code()).name
        if await call.details() == "Internal error from Core":
            code = "DEADLINE_EXCEEDED"  # the client's own words for a message that the end of the call overtook
        outcomes[path, code] += 1
        if code not in FINE:
            defects.append(f"{path} {raw!r}: {code} {await call.details()}")

    async def scenario() -> None:
        limits = Limits(max_queued_requests=1000)
        async with connected(engine, limits, control=ControlConfig(0)) as (server, client):
            async with grpc.aio.insecure_channel(f"localhost:{server.control_port}") as control:
                channels = {"main": client._channel, "control": control}
                messages = iter(range(NUM_MESSAGES))

                async def work() -> None:
                    for _ in messages:
                        path, message = rng.choice(good)
                        await send(channels, path, mutated(rng, message, rng.choice(good)[1]))

                async with asyncio.TaskGroup() as workers:
                    for _ in range(AT_A_TIME):
                        workers.create_task(work())
            assert (await client.generate("still there", max_tokens=2)).usage is not None

    run(scenario(), 60 + NUM_MESSAGES / 50)
    assert not defects, "\n".join(defects[:5])
    accepted = sum(count for (_, code), count in outcomes.items() if code == "OK")
    assert sum(outcomes.values()) == NUM_MESSAGES
    assert NUM_MESSAGES // 5 < accepted < NUM_MESSAGES * 4 // 5, "mutations that all pass, or none, test little"
