"""What is refused, with which status, and that it is refused at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import grpc
import pytest

from jaxinfer.engine import Engine
from serving.client import AsyncClient
from serving.generated import inference_pb2 as pb
from serving.settings import Limits
from tests.serving.harness import GREEDY, Brake, address, collect, connected, refused, run, serving, submitted, until

PROMPT = "one small prompt"


@pytest.mark.parametrize(
    ("prompt", "fields", "words"),
    [
        (PROMPT, {"top_p": 1.5}, ["top_p=1.5", "(0, 1]"]),
        (PROMPT, {"temperature": -1.0}, ["temperature=-1", "[0, 100]"]),
        (PROMPT, {"temperature": float("nan")}, ["temperature"]),
        (PROMPT, {"n": 0}, ["n=0"]),
        (PROMPT, {"n": 5}, ["n=5", "4"]),
        (PROMPT, {"max_tokens": 0}, ["max_tokens=0", "at least 1"]),
        (PROMPT, {"min_tokens": 20}, ["min_tokens=20", "max_tokens=16"]),
        (PROMPT, {"seed": 2**40}, ["seed=", str(2**32 - 1)]),
        (PROMPT, {"logprobs": 21}, ["logprobs=21", "[0, 20]"]),
        (PROMPT, {"stop": [""]}, ["stop"]),
        (PROMPT, {"stop": ["x"] * 65}, ["stop", "65", "64"]),
        (PROMPT, {"stop": ["x" * 1025]}, ["stop", "1025", "1024"]),
        (PROMPT, {"logit_bias": {96: 1.0}}, ["logit_bias", "96"]),
        (PROMPT, {"allowed_token_ids": [3], "banned_token_ids": [3]}, ["banned_token_ids"]),
        (PROMPT, {"request_id": "x" * 257}, ["request_id", "257", "256"]),
        ("", {}, ["text is empty"]),
        ([], {}, ["token_ids is empty"]),
        ([5, 96], {}, ["token id 96", "0 to 95"]),
        ([5] * 96, {}, ["96 tokens", "max_model_len=96"]),
        ("x" * 96, {}, ["96 tokens", "max_model_len=96"]),
        ("x" * 4000, {}, ["4000 bytes", "max_model_len=96"]),
        ([{"content": "x"}], {}, ["chat.messages[0].role"]),
    ],
)
def test_bad_arguments_name_the_field(engine: Engine, prompt: Any, fields: dict[str, Any], words: list[str]) -> None:
    async def scenario() -> None:
        async with connected(engine) as (_, client):
            await refused(client.generate(prompt, **fields), "INVALID_ARGUMENT", *words)
            await refused(collect(client.stream(prompt, **fields)), "INVALID_ARGUMENT", *words)

    run(scenario())


def test_no_prompt_and_fields_of_the_future(engine: Engine) -> None:
    async def scenario() -> None:
        async with connected(engine) as (_, client):
            generate = client._inference.Generate
            await refused(generate(pb.GenerateRequest()), "INVALID_ARGUMENT", "prompt is missing")
            await refused(generate(pb.GenerateRequest(chat=pb.Chat())), "INVALID_ARGUMENT", "chat.messages is empty")
            images = pb.GenerateRequest(text=PROMPT)
            images.MergeFromString(bytes([20 << 3 & 0x7F | 0x80, 1, 5]))  # field 20, the number 5
            await refused(generate(images), "INVALID_ARGUMENT", "20", "GenerateRequest")

    run(scenario())


def test_another_model(engine: Engine) -> None:
    async def scenario() -> None:
        async with connected(engine) as (_, client):
            await refused(client.generate(PROMPT, model="big"), "NOT_FOUND", "'big'", "'small'")
            answer = await client.generate(PROMPT, model="small", max_tokens=1)
            assert answer.prompt is not None
            assert answer.prompt.model == "small"

    run(scenario())


def test_too_large_a_message(engine: Engine) -> None:
    async def scenario() -> None:
        async with connected(engine, Limits(max_message_bytes=1024)) as (_, client):
            await refused(client.generate("x" * 2000), "RESOURCE_EXHAUSTED", "larger than max")

    run(scenario())


def test_overload_in_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four run, two wait; the seventh hears at once when to come again, and those inside do not notice."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(max_queued_requests=2)) as (server, client):
            inside = [asyncio.create_task(client.generate(PROMPT, max_tokens=4, **GREEDY)) for _ in range(6)]
            await until(lambda: server.frontend.admission.num_requests == 6)
            seconds = []
            for _ in range(20):
                started = time.monotonic()
                error = await refused(client.generate(PROMPT), "RESOURCE_EXHAUSTED", "6 requests", "try again in")
                seconds.append(time.monotonic() - started)
                (pushback,) = [value for key, value in error.trailing_metadata() if key == "grpc-retry-pushback-ms"]
                assert 100 <= int(pushback) <= 30_000
            assert statistics.median(seconds) < 0.5  # not each: the machine may be busy with something else
            brake.release()
            assert len({answer.text for answer in await asyncio.gather(*inside)}) == 1
            await client.generate(PROMPT, max_tokens=1)

    run(scenario())


def test_too_many_calls(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that send nothing take no place in the queue, but do not come without end either."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(max_connections=2)) as (server, client):
            silent = client._inference.GenerateMany()
            inside = asyncio.create_task(client.generate(PROMPT, max_tokens=4, **GREEDY))
            await until(lambda: server.frontend._num_calls == 2)
            await refused(client.generate(PROMPT), "RESOURCE_EXHAUSTED", "2 calls are open", "takes 2")
            await refused(client.models(), "RESOURCE_EXHAUSTED", "2 calls are open")
            assert await client.is_serving()
            silent.cancel()
            await until(lambda: server.frontend._num_calls == 1)
            assert await client.models()
            brake.release()
            await inside

    run(scenario())


def test_too_many_connections(engine: Engine) -> None:
    """A connection beyond the limit is cut at once, a place that becomes free is taken."""

    async def scenario() -> None:
        async with serving(engine, Limits(max_connections=2)) as server:
            (first, first_writer), (second, second_writer) = [await http2_connection(server.port) for _ in range(2)]
            for reader in (first, second):
                assert await reader.read(1)
            third, third_writer = await http2_connection(server.port)
            assert await third.read() == b""
            first_writer.close()
            await first_writer.wait_closed()
            async with AsyncClient(address(server), max_tries=20) as client:
                assert await client.models()
            for writer in (second_writer, third_writer):
                writer.close()

    run(scenario())


async def http2_connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to this machine that has sent what HTTP/2 begins with: the preface and empty settings."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    return reader, writer


def test_overload_in_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(max_queued_tokens=100)) as (server, client):
            inside = [asyncio.create_task(client.generate([5] * 45, max_tokens=2)) for _ in range(2)]
            await until(lambda: server.frontend.admission.num_requests == 2)
            await refused(client.generate([5] * 45), "RESOURCE_EXHAUSTED", "90 prompt tokens are waiting")
            inside.append(asyncio.create_task(client.generate([5] * 9, max_tokens=2)))
            await until(lambda: server.frontend.admission.num_requests == 3)
            # Four bytes a token is a guess: this text has more tokens than it was let in for.
            await refused(client.generate("x" * 4), "RESOURCE_EXHAUSTED")
            brake.release()
            await asyncio.gather(*inside)

    run(scenario())


def test_the_client_tries_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(max_queued_requests=0)) as (server, client):
            inside = [asyncio.create_task(client.generate(PROMPT, max_tokens=2)) for _ in range(4)]
            await until(lambda: server.frontend.admission.num_requests == 4)
            patient = type(client)(f"localhost:{server.port}", max_tries=50, timeout=20)
            async with patient:
                unary = asyncio.create_task(patient.generate(PROMPT, max_tokens=2, **GREEDY))
                stream = asyncio.create_task(collect(patient.stream(PROMPT, max_tokens=2, **GREEDY)))
                await asyncio.sleep(0.15)
                assert not unary.done()
                assert not stream.done()
                brake.release()
                assert (await unary).text == (await stream)[0].text
            await asyncio.gather(*inside)
            with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                await client.generate(PROMPT, max_tokens=80, timeout=1e-3)

    run(scenario())


def test_queue_time_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has started is not ended by it, one that waits is, with what it used and why."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            running = [
                asyncio.create_task(client.generate(PROMPT, max_tokens=30, queue_time_limit_ms=1000, **GREEDY))
                for _ in range(4)
            ]
            await submitted(server, 4)
            brake.let(8)
            await brake.held_after(8)
            unary = asyncio.create_task(client.generate(PROMPT, queue_time_limit_ms=1000))
            messages: list[pb.GenerateResponse] = []

            async def read() -> None:
                async for message in client.stream(PROMPT, n=2, queue_time_limit_ms=1000):
                    messages.append(message)

            stream = asyncio.create_task(read())
            await submitted(server, 6)
            brake.let(1)
            await brake.held_after(9)  # the engine has them, and no place for them
            await asyncio.sleep(1.1)
            brake.let(2)
            await refused(unary, "DEADLINE_EXCEEDED", "queue_time_limit_ms=1000")
            await refused(stream, "DEADLINE_EXCEEDED", "queue_time_limit_ms=1000")
            (last,) = messages
            assert [sequence.finish.reason for sequence in last.sequences] == [pb.FINISH_REASON_TIME_LIMIT] * 2
            assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(PROMPT), 0)
            brake.release()
            for answer in await asyncio.gather(*running):
                assert answer.completions[0].finish_reason == "length"

    run(scenario())
