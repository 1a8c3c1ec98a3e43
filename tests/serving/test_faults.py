"""Clients that leave, readers that stand still, steps that fail: the others never notice, and nothing is kept."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc.aio import EOF
from grpc_health.v1 import health_pb2

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from serving.calls import Service
from serving.client import AsyncClient, make_request
from serving.frontend import Frontend
from serving.generated import inference_pb2 as pb
from serving.generated import inference_pb2_grpc
from serving.settings import Limits
from tests.e2e.harness import num_pages_held
from tests.serving.harness import GREEDY, Brake, address, collect, connected, refused, run, serving, submitted, until

PROMPT = "one small prompt"


async def _read_all(call: Any, into: list[pb.GenerateResponse] | None = None) -> None:
    while (message := await call.read()) is not EOF:
        if into is not None:
            into.append(message)


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
def test_a_client_that_leaves_frees_everything_in_two_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    engine = llm.engine
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=40, **GREEDY))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client), AsyncClient(address(server)) as leaver:
            keeper = asyncio.create_task(client.generate(PROMPT, max_tokens=40, **GREEDY))
            await until(lambda: server.frontend.admission.num_requests == 1)
            timeout = 2 if how == "deadline" else None
            request = make_request("the victim", n=3, max_tokens=60, ignore_eos=True)
            call = leaver._inference.GenerateStream(request, timeout=timeout)
            await submitted(server, 2)
            brake.let(6)
            assert (await call.read()).sequences
            await brake.held_after(6)
            assert engine.scheduler.num_running == 4
            if how == "cancel":
                call.cancel()
            elif how == "disconnect":
                await leaver.close()
            else:
                assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: not server.frontend.engine._commands.empty())
            brake.let(2)
            await until(lambda: server.frontend.admission.num_requests == 1)
            assert brake.num_steps <= 8
            assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 0)
            brake.release()
            assert (await keeper).completions[0].token_ids == expected.outputs[0].token_ids

    run(scenario())


def test_leaving_many_ends_all_its_items(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(max_items_in_flight=3)) as (server, client):
            call = client._inference.GenerateMany()
            for _ in range(5):
                await call.write(pb.GenerateManyRequest(request=make_request(PROMPT, max_tokens=60, ignore_eos=True)))
            await submitted(server, 3)
            brake.let(3)
            await brake.held_after(3)
            assert server.frontend.admission.num_requests == 3, "the others wait at the client"
            call.cancel()
            await until(lambda: server.frontend.engine._commands.qsize() == 3)
            brake.let(3)
            await until(lambda: server.frontend.admission.num_requests == 0)
            brake.release()

    run(scenario())


def test_a_call_that_was_over_before_its_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC may say so in a write, before it cancels what answers the call: nobody's defect, and nothing stays."""

    async def over(self: Service, context: Any, message: Any) -> None:
        raise grpc.aio.InternalError("execute_batch")

    async def scenario() -> None:
        async with connected(engine) as (server, client):
            with monkeypatch.context() as patch:
                patch.setattr(Service, "write", over)
                call = client._inference.GenerateStream(make_request(PROMPT, max_tokens=60))
                await refused(_read_all(call), "ABORTED", "over")
            await until(lambda: server.frontend.admission.num_requests == 0)

    run(scenario())


@pytest.mark.parametrize("limits", [Limits(stall_seconds=0.3), Limits(stall_seconds=20, max_unread_tokens=30)])
def test_stalled_reader(llm: LLM, limits: Limits) -> None:
    """Nobody reads the stream, and the window of the connection is full: it ends with ABORTED, and only it."""
    engine = llm.engine
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=60, **GREEDY))
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1), ("grpc.enable_retries", 0)]

    async def scenario() -> None:
        async with (
            connected(engine, limits) as (server, client),
            grpc.aio.insecure_channel(address(server), narrow) as channel,
        ):
            # Log-probabilities make messages large: an answer of these is longer than the connection's window.
            big = make_request(PROMPT, max_tokens=79, n=4, logprobs=20, prompt_logprobs=20, ignore_eos=True)
            call = inference_pb2_grpc.InferenceStub(channel).GenerateStream(big)
            assert (await call.read()).HasField("prompt")
            answer = await client.generate(PROMPT, max_tokens=60, **GREEDY)
            assert answer.completions[0].token_ids == expected.outputs[0].token_ids
            await until(lambda: server.frontend.admission.num_requests == 0)
            assert num_pages_held(engine) == 0
            await asyncio.sleep(0.5)
            await refused(_read_all(call), "ABORTED", "the reader")

    run(scenario())


@pytest.mark.parametrize("errors_expected", [True])
def test_failed_step_is_retried_or_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=10, **GREEDY))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            watch = client._health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            begun = client._inference.GenerateStream(make_request("begun", max_tokens=50, ignore_eos=True))
            brake.let(4)
            assert (await begun.read()).sequences
            fresh = asyncio.create_task(client.generate(PROMPT, max_tokens=10, **GREEDY))
            await until(lambda: server.frontend.admission.num_requests == 2)
            await brake.held_after(4)
            brake.fail = 1
            brake.let(1)
            rest: list[pb.GenerateResponse] = []
            await refused(_read_all(begun, rest), "INTERNAL", "pulled the plug")
            assert rest[-1].sequences[0].finish.reason == pb.FINISH_REASON_ERROR
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            brake.release()
            assert (await fresh).completions[0].token_ids == expected.outputs[0].token_ids
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()

    run(scenario())


async def _fail_one_that_has_begun(client: AsyncClient, brake: Brake) -> None:
    """Nothing else runs, and nothing is left to retry."""
    begun = client._inference.GenerateStream(make_request("begun", max_tokens=50, ignore_eos=True))
    brake.let(4)
    assert (await begun.read()).sequences
    await brake.held_after(4)
    brake.fail = 1
    brake.let(1)
    await refused(_read_all(begun), "INTERNAL")


@pytest.mark.parametrize("errors_expected", [True])
def test_an_idle_server_proves_itself_well_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only request had begun, so nothing is left to retry; health comes back without one."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            await _fail_one_that_has_begun(client, brake)
            assert not await client.is_serving()
            brake.release()
            await until(lambda: server.frontend.healthy)
            assert await client.is_serving()
            await until(lambda: not engine.has_unfinished())

    run(scenario())


@pytest.mark.parametrize("errors_expected", [True])
def test_a_server_stopped_before_it_is_well_again_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            await _fail_one_that_has_begun(client, brake)
            await until(lambda: brake.is_holding)
            # The probe waits for its step; the stop is read before it is over.
            server.frontend.engine._commands.put(server.frontend.engine._stop)
        assert not engine.has_unfinished()

    run(scenario())


@pytest.mark.parametrize("errors_expected", [True])
def test_an_engine_that_keeps_failing_is_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            inside = [asyncio.create_task(client.generate(PROMPT)) for _ in range(3)]
            await until(lambda: server.frontend.admission.num_requests == 3)
            brake.fail = 3
            brake.release()
            for call in inside:
                with pytest.raises(grpc.aio.AioRpcError, match=r"INTERNAL|UNAVAILABLE"):
                    await call
            async with asyncio.timeout(5):
                await server.wait_until_dead()
            assert not await client.is_serving()
            await refused(client.generate(PROMPT), "UNAVAILABLE", "the engine has failed")

    run(scenario())


@pytest.mark.parametrize("was_idle", [True, False])
def test_a_step_that_hangs_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch, was_idle: bool) -> None:
    """An idle engine does not hang, nor one that is slow; one whose step does not return is given up."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, Limits(step_timeout=0.4)) as (server, client):
            if was_idle:
                await asyncio.sleep(0.8)
            calls = [asyncio.create_task(client.generate(PROMPT, max_tokens=40, ignore_eos=True)) for _ in range(3)]
            await until(lambda: server.frontend.admission.num_requests == 3)
            for _ in range(4):
                brake.let(1)
                await asyncio.sleep(0.2)
            assert server.frontend.healthy
            async with asyncio.timeout(2):
                await server.wait_until_dead()
            assert not server.frontend.healthy
            for call in calls:
                await refused(call, "UNAVAILABLE", "the engine has failed")
            await refused(client.generate(PROMPT), "UNAVAILABLE", "the engine has failed")
            # What is left of the thread must let go of the engine, which the tests share.
            server.frontend.engine._commands.put(server.frontend.engine._stop)
            brake.release()
            await asyncio.to_thread(server.frontend.engine._thread.join)

    run(scenario())


def test_health_before_and_after(engine: Engine) -> None:
    """NOT_SERVING while loading and draining; a Watch is told and then ended."""

    async def scenario() -> None:
        from serving.server import Server, ServerConfig

        server = Server(ServerConfig("small", port=0, grace=5), lambda: engine)
        await server.listen()
        async with AsyncClient(address(server), max_tries=1) as client:
            health = client._health
            watch = health.Watch(health_pb2.HealthCheckRequest(service="jaxinfer.v1.Inference"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await refused(client.generate(PROMPT), "UNAVAILABLE", "starting")
            await refused(client.models(), "UNAVAILABLE", "starting")
            await server.load()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            await client.generate(PROMPT, max_tokens=1)
            nobody = health_pb2.HealthCheckRequest(service="nobody")
            await refused(health.Check(nobody), "NOT_FOUND", "nobody")
            unknown = health.Watch(nobody)
            assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            assert await server.drain()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watch.read() is EOF
            assert await unknown.read() is EOF
        await server.stop()

    run(scenario())


def test_drain_answers_what_was_accepted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=30, **GREEDY))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine) as (server, client):
            streams = [asyncio.create_task(collect(client.stream(PROMPT, max_tokens=30, **GREEDY))) for _ in range(3)]
            unary = [asyncio.create_task(client.generate(PROMPT, max_tokens=30, **GREEDY)) for _ in range(3)]
            many = client._inference.GenerateMany()
            await many.write(pb.GenerateManyRequest(request=make_request(PROMPT, max_tokens=30, **GREEDY)))
            await until(lambda: server.frontend.admission.num_requests == 7)
            draining = asyncio.create_task(server.drain())
            await until(lambda: server.frontend.draining.is_set())
            await refused(client.generate(PROMPT), "UNAVAILABLE", "shutting down")
            assert not await client.is_serving()
            brake.release()
            for answer in [*(await asyncio.gather(*unary)), *(whole for whole, _ in await asyncio.gather(*streams))]:
                assert answer.completions[0].token_ids == expected.outputs[0].token_ids
            message = await many.read()
            assert (message.status.code, message.HasField("status")) == (0, True)
            assert list(message.response.sequences[0].token_ids) == expected.outputs[0].token_ids
            await refused(many.read(), "UNAVAILABLE", "shutting down")
            assert await draining

    run(scenario())


def test_drain_ends_after_its_grace(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with connected(engine, grace=0.1) as (server, client):
            stream = asyncio.create_task(collect(client.stream(PROMPT, max_tokens=70, ignore_eos=True)))
            await submitted(server, 1)
            draining = asyncio.create_task(server.drain())
            brake.let(4)
            await asyncio.sleep(0.2)
            brake.release()
            await refused(stream, "UNAVAILABLE", "shut down")
            assert not await draining

    run(scenario())


def test_a_prompt_still_being_made_token_ids_does_not_outlast_the_grace(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        read, token_ids = asyncio.Event(), Frontend.token_ids

        async def held(self: Frontend, *prompt: Any) -> tuple[int, ...]:
            await read.wait()
            return await token_ids(self, *prompt)

        monkeypatch.setattr(Frontend, "token_ids", held)
        async with connected(engine, grace=0.1) as (server, client):
            call = asyncio.create_task(client.generate(PROMPT, max_tokens=70, ignore_eos=True))
            await until(lambda: server.frontend.admission.num_requests == 1)
            draining = asyncio.create_task(server.drain())
            await until(lambda: server.frontend._has_ended)
            read.set()
            await refused(call, "UNAVAILABLE", "shut down")
            assert not await draining

    run(scenario())


def test_stop_ends_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with serving(engine) as server:
            client = AsyncClient(address(server), max_tries=1)
            call = asyncio.create_task(client.generate(PROMPT, max_tokens=70, ignore_eos=True))
            await until(lambda: server.frontend.admission.num_requests == 1)
            brake.release()
        await refused(call, "UNAVAILABLE")
        await client.close()

    run(scenario())
