"""Requests of every kind, with clients that leave in every way: each accepted one ends exactly once, and
afterwards nothing is held.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import random
import weakref
from typing import Any

import grpc
import pytest

from jaxinfer.engine import Engine
from serving.client import AsyncClient, Generation, make_request
from serving.deltas import Delta, End
from serving.errors import RequestError
from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc
from serving.request_stream import RequestStream
from serving.settings import Limits
from tests.serving.harness import address, run, serving, until

AT_A_TIME = 24
STALL_SECONDS = 1.0
# What clients do, and how often of a hundred times.
KINDS = {"unary": 22, "stream": 22, "slow": 11, "cancel": 11, "deadline": 11, "many": 12, "disconnect": 11}
STALL_EVERY = 400  # requests: it lasts, and takes the engine for itself
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1), ("grpc.enable_retries", 0)]


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors as Linux shows them")
@pytest.mark.parametrize(
    ("seed", "num_requests"), [(0, 800), *(pytest.param(seed, 5000, marks=pytest.mark.slow) for seed in (1, 2, 3, 4))]
)
def test_every_accepted_request_ends_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, seed: int, num_requests: int
) -> None:
    rng = random.Random(seed)
    begun: collections.Counter[str] = collections.Counter()
    ended: collections.Counter[str] = collections.Counter()
    given: collections.Counter[str] = collections.Counter()  # tokens
    outcomes: collections.Counter[str] = collections.Counter()
    alive: weakref.WeakSet[RequestStream] = weakref.WeakSet()
    begin, give, end = RequestStream.__init__, RequestStream.give, RequestStream._end

    def counted_begin(self: RequestStream, request: Any, *arguments: Any, **more: Any) -> None:
        begin(self, request, *arguments, **more)
        begun[request.request_id] += 1
        alive.add(self)

    def counted_give(self: RequestStream, delta: Delta) -> None:
        given[self.request.request_id] += delta.num_tokens
        give(self, delta)

    def counted_end(self: RequestStream, how: End | RequestError) -> None:
        ended[self.request.request_id] += 1
        tokens = how.num_completion_tokens if isinstance(how, End) else 0
        assert given[self.request.request_id] == tokens, "the server's own count, whatever its reader sees of it"
        end(self, how)

    monkeypatch.setattr(RequestStream, "__init__", counted_begin)
    monkeypatch.setattr(RequestStream, "give", counted_give)
    monkeypatch.setattr(RequestStream, "_end", counted_end)

    def check(whole: Generation) -> None:
        """The answer's own counts agree."""
        assert whole.usage is not None
        given = [len(completion.token_ids) for completion in whole.completions]
        assert sum(given) == whole.usage.completion_tokens
        for completion, count in zip(whole.completions, given, strict=True):
            assert completion.finish is not None
            assert completion.finish.completion_tokens == count

    def request() -> dict[str, Any]:
        return {
            "prompt": [rng.randrange(3, 96) for _ in range(rng.choice((1, 5, 15, 40)))],
            "max_tokens": rng.choice((1, 2, 5, 12)),
            "n": rng.choice((1, 1, 1, 2, 3)),
            "ignore_eos": rng.random() < 0.5,
            "priority": rng.choice((0, 0, 1)),
            "queue_time_limit_ms": rng.choice((None, None, 200, 5)),
        }

    async def stream(client: AsyncClient, leaves_after: int | None, timeout: float | None, pause: float) -> None:
        whole = Generation()
        fields = request()
        call: Any = client._inference.GenerateStream(make_request(fields.pop("prompt"), **fields), timeout=timeout)
        number = 0
        async for message in call:
            assert message.seq == number, "a gap"
            assert whole.usage is None, "something after the end"
            whole.add(message)
            number += 1
            await asyncio.sleep(pause)
            if number == leaves_after:
                call.cancel()
                raise asyncio.CancelledError
        check(whole)

    async def many(client: AsyncClient) -> None:
        answers: dict[int, Generation] = collections.defaultdict(Generation)
        statuses: collections.Counter[int] = collections.Counter()
        items = [request() for _ in range(rng.randint(1, 4))]
        messages = [
            pb.GenerateManyRequest(request=make_request(fields.pop("prompt"), **fields), stream=rng.random() < 0.5)
            for fields in items
        ]
        call: Any = client._inference.GenerateMany(iter(messages))
        async for message in call:
            assert not statuses[message.item], "something after the status"
            answers[message.item].add(message.response)
            if message.HasField("status"):
                statuses[message.item] += 1
                if message.status.code == 0:
                    check(answers[message.item])
        assert statuses == dict.fromkeys(range(len(items)), 1)

    async def disconnect(where: str) -> None:
        async with AsyncClient(where, max_tries=1) as client:
            call = asyncio.create_task(stream(client, None, None, 0.0))
            await asyncio.sleep(rng.uniform(0, 0.05))
        await call

    async def stall(where: str) -> None:
        """Read one message and nothing more for longer than the server bears; then what it says."""
        async with grpc.aio.insecure_channel(where, NARROW) as channel:
            # Log-probabilities make messages large: an answer of these is longer than the connection's window.
            big = make_request([5] * 10, max_tokens=80, n=4, logprobs=20, prompt_logprobs=20, ignore_eos=True)
            call: Any = inference_pb2_grpc.InferenceStub(channel).GenerateStream(big)
            await call.read()
            await asyncio.sleep(2 * STALL_SECONDS)
            while await call.read() is not grpc.aio.EOF:
                pass

    async def one(client: AsyncClient, where: str, number: int) -> str:
        (kind,) = ("stall",) if number % STALL_EVERY == 0 else rng.choices(tuple(KINDS), tuple(KINDS.values()))
        try:
            if kind == "unary":
                fields = request()
                check(await client.generate(fields.pop("prompt"), **fields))
            elif kind == "many":
                await many(client)
            elif kind == "disconnect":
                await disconnect(where)
            elif kind == "stall":
                await stall(where)
            else:
                leaves_after = rng.randint(1, 4) if kind == "cancel" else None
                timeout = rng.uniform(0.001, 0.1) if kind == "deadline" else None
                await stream(client, leaves_after, timeout, 0.02 if kind == "slow" else 0.0)
        except grpc.aio.AioRpcError as error:
            return f"{kind} {error.code().name}"
        except asyncio.CancelledError:
            return f"{kind} CANCELLED"
        return f"{kind} OK"

    async def scenario() -> None:
        limits = Limits(max_queued_requests=24, max_items_in_flight=4, stall_seconds=STALL_SECONDS)
        async with serving(engine, limits) as server, AsyncClient(address(server), max_tries=1) as client:
            await client.generate([5], max_tokens=1)
            descriptors = num_descriptors()
            numbers = iter(range(num_requests))

            async def work() -> None:
                for number in numbers:
                    outcomes[await one(client, address(server), number)] += 1

            async with asyncio.TaskGroup() as workers:
                for _ in range(AT_A_TIME):
                    workers.create_task(work())
            await until(lambda: server.frontend.admission.num_requests == 0)
            assert not server.frontend.engine.streams
            await until(lambda: not server.frontend.engine._jobs)
            await until(lambda: num_descriptors() <= descriptors)
            # What tells a client that is gone may wait for it for a second.
            await until(lambda: gc.collect() >= 0 and not alive, seconds=2)

    run(scenario(), 60 + num_requests / 20)
    assert begun == ended
    assert set(begun.values()) == {1}
    assert sum(outcomes.values()) == num_requests
    codes = {outcome.split()[1] for outcome in outcomes}
    assert codes <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED"}, outcomes
    assert outcomes["stall ABORTED"], outcomes
    assert {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"} <= codes, outcomes
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith(" OK")) > num_requests // 4, outcomes
