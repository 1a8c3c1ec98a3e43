"""Overload, clients that leave, readers that stand still, steps that fail, and the end: by HTTP's own means."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from serving.server import Server, ServerConfig
from serving.settings import Limits
from tests.e2e.harness import num_pages_held
from tests.serving.harness import Brake, connected, run, submitted, until
from tests.serving.http.harness import GREEDY, events, http_serving, url

PROMPT = "one small prompt"


def _body(**fields: Any) -> dict[str, Any]:
    return {**GREEDY, "prompt": PROMPT, **fields}


async def _post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=_body(**fields))


def _request(**fields: Any) -> bytes:
    """As it goes over the wire."""
    body = json.dumps(_body(**fields)).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """One whose system takes as little as it can before it is read."""
    assert server.http is not None
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", server.http.port))
    return await asyncio.open_connection(sock=connection, limit=4096)


def _error(response: httpx.Response, status: int, kind: str, *words: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == kind
    for word in words:
        assert word in error["message"], error
    return error


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_everything_in_two_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    engine = llm.engine
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine) as (server, client):
            keeper = asyncio.create_task(_post(client, max_tokens=40))
            await until(lambda: server.frontend.admission.num_requests == 1)
            reader, writer = await _connect(server)
            writer.write(_request(n=3, max_tokens=60, stream=is_streamed))
            await submitted(server, 2)
            brake.let(6)
            if is_streamed:
                assert b"200 OK" in await reader.readline()
            await brake.held_after(6)
            assert engine.scheduler.num_running == 4
            writer.close()
            await until(lambda: not server.frontend.engine._commands.empty())
            brake.let(2)
            await until(lambda: server.frontend.admission.num_requests == 1)
            assert brake.num_steps <= 8
            assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 0)
            brake.release()
            assert (await keeper).json()["choices"][0]["text"] == expected.outputs[0].text

    run(scenario())


@pytest.mark.parametrize("limits", [Limits(stall_seconds=0.3), Limits(stall_seconds=2, max_unread_tokens=30)])
def test_stalled_reader(llm: LLM, limits: Limits, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody reads the stream: it is cut, its pages are free, and nobody else notices."""
    engine = llm.engine
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))

    async def scenario() -> None:
        async with http_serving(engine, limits) as (server, client):
            assert server.http is not None
            for one in server.http._server.servers[0].sockets:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            reader, writer = await _connect(server)
            # Log-probabilities make it longer than what systems and buffers take.
            writer.write(_request(n=4, max_tokens=79, logprobs=20, stream=True))
            await until(lambda: server.frontend.admission.num_requests == 1)
            answer = await _post(client, max_tokens=60)
            assert answer.json()["choices"][0]["text"] == expected.outputs[0].text
            await until(lambda: server.frontend.admission.num_requests == 0)
            assert num_pages_held(engine) == 0
            connections = server.http._server.server_state.connections
            await until(lambda: not any(c.cycle and not c.cycle.response_complete for c in connections))
            with suppress(ConnectionResetError):
                assert b"[DONE]" not in await reader.read()
            writer.close()
        if limits.max_unread_tokens == 30:  # otherwise the engine may have been quicker than the limit
            (line,) = [r.fields for r in caplog.records if getattr(r, "fields", {}).get("status") == "ABORTED"]
            assert "the reader" in line["error"]
            assert line["finish"] == "abort,abort,abort,abort"

    with caplog.at_level("INFO"):
        run(scenario())


def test_connections_that_bring_nothing_are_cut(engine: Engine) -> None:
    async def scenario() -> None:
        async with http_serving(engine, Limits(stall_seconds=0.2)) as (server, _):
            for beginning, answer in (
                (b"", b""),
                (b"POST /v1/completions HTTP/1.1\r\nHost: local", b""),
                (_request()[:-5], b"HTTP/1.1 408"),
            ):
                reader, writer = await _connect(server)
                writer.write(beginning)
                async with asyncio.timeout(5):
                    got = b""
                    try:
                        got = await reader.read()
                    except ConnectionResetError:
                        assert not answer
                assert got.startswith(answer)
                writer.close()

    run(scenario())


def test_overload(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four run, two wait; the seventh hears at once when to come again, and those inside do not notice."""

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine, Limits(max_queued_requests=2)) as (server, client):
            inside = [asyncio.create_task(_post(client, max_tokens=4)) for _ in range(6)]
            await until(lambda: server.frontend.admission.num_requests == 6)
            took: list[float] = []
            for is_streamed in (False, True) * 5:
                started = time.monotonic()
                response = await _post(client, stream=is_streamed)
                took.append(time.monotonic() - started)
                _error(response, 429, "rate_limit_error", "6 requests", "try again in")
                assert 1 <= int(response.headers["retry-after"]) <= 30
                assert 100 <= int(response.headers["retry-after-ms"]) <= 30_000
            assert statistics.median(took) < 0.5
            # One that does not fit whole is not let in by half.
            _error(await _post(client, prompt=["a", "b"]), 429, "rate_limit_error")
            assert server.frontend.admission.num_requests == 6
            brake.release()
            answers = await asyncio.gather(*inside)
            assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
            assert server.frontend.refusals.counts == {"RESOURCE_EXHAUSTED": 11}

    run(scenario())


def test_queue_time_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine) as (server, client):
            running = asyncio.create_task(_post(client, n=4, max_tokens=30))
            await submitted(server, 1)
            brake.let(8)
            await brake.held_after(8)
            await until(lambda: server.frontend.admission.num_waiting_tokens == 0)
            fields: dict[str, Any] = {"queue_time_limit_ms": 50, "echo": True, "logprobs": 1}
            late = [asyncio.create_task(_post(client, stream=s, **fields)) for s in (False, True)]
            await submitted(server, 3)
            await asyncio.sleep(0.1)
            brake.let(2)
            _error(await late[0], 504, "server_error", "queue_time_limit_ms=50")
            streamed = await late[1]  # an event, or all of the answer where the engine had not seen it in time
            (last,) = [line for line in streamed.text.splitlines() if "error" in line]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
            brake.release()
            assert (await running).status_code == 200

    run(scenario())


@pytest.mark.parametrize("errors_expected", [True])
def test_failed_step_is_retried_or_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=10, temperature=0, ignore_eos=True))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine) as (server, client):
            begun = asyncio.create_task(_post(client, max_tokens=50, stream=True))
            await submitted(server, 1)
            brake.let(4)
            await brake.held_after(4)
            fresh = asyncio.create_task(_post(client, max_tokens=10))
            await submitted(server, 2)
            brake.fail = 1
            brake.let(1)
            lines = [line for line in (await begun).text.splitlines() if line]
            assert "pulled the plug" in json.loads(lines[-1][6:])["error"]["message"]
            assert (await client.get("/health")).status_code == 503
            brake.release()
            assert (await fresh).json()["choices"][0]["text"] == expected.outputs[0].text
            assert (await client.get("/health")).status_code == 200

    run(scenario())


def test_before_and_after(engine: Engine) -> None:
    """/health tells loading and draining; neither takes requests, and both still answer."""

    async def scenario() -> None:
        server = Server(ServerConfig("small", port=0, http_port=0, grace=5), lambda: engine)
        await server.listen()
        async with httpx.AsyncClient(base_url=url(server)) as client:
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/version")).status_code == 200
            assert "jaxinfer_healthy" in (await client.get("/metrics")).text
            for response in (await _post(client), await client.get("/v1/models")):
                _error(response, 503, "server_error", "starting")
                assert response.headers["retry-after"] == "1"
            await server.load()
            assert (await client.get("/health")).status_code == 200
            assert (await _post(client, max_tokens=1)).status_code == 200
            assert await server.drain()
        await server.stop()

    run(scenario())


def test_drain_answers_what_was_accepted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm.engine
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))

    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine) as (server, client):
            stream = asyncio.create_task(_post(client, max_tokens=30, stream=True))
            whole = asyncio.create_task(_post(client, max_tokens=30))
            await until(lambda: server.frontend.admission.num_requests == 2)
            draining = asyncio.create_task(server.drain())
            await until(lambda: server.frontend.draining.is_set())
            _error(await _post(client), 503, "server_error", "shutting down")
            assert (await client.get("/health")).status_code == 503
            brake.release()
            text = "".join(part["choices"][0]["text"] for part in events((await stream).text))
            assert text == (await whole).json()["choices"][0]["text"] == expected.outputs[0].text
            assert await draining
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")

    run(scenario())


def test_drain_and_stop_end_what_takes_too_long(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with http_serving(engine, grace=0.1) as (server, client):
            stream = asyncio.create_task(_post(client, max_tokens=70, stream=True))
            await submitted(server, 1)
            draining = asyncio.create_task(server.drain())
            brake.let(4)
            await asyncio.sleep(0.2)
            brake.release()
            last = (await stream).text.splitlines()[-2]
            assert json.loads(last[6:])["error"]["code"] == "unavailable"
            assert not await draining

    run(scenario())


def test_one_queue_for_both_protocols(llm: LLM) -> None:
    engine = llm.engine
    (expected,) = llm.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))

    async def scenario() -> None:
        async with (
            connected(engine, http_port=0) as (server, grpc_client),
            httpx.AsyncClient(base_url=url(server)) as web,
        ):
            both = await asyncio.gather(
                grpc_client.generate(PROMPT, max_tokens=20, temperature=0, ignore_eos=True), _post(web, max_tokens=20)
            )
            assert both[0].text == both[1].json()["choices"][0]["text"] == expected.outputs[0].text

    run(scenario())
