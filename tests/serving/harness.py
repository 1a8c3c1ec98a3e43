"""A real server on a free port of this machine, in the test's own process and event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Self

import grpc
import pytest

from jaxinfer.engine import Engine
from serving.client import AsyncClient, Generation
from serving.server import Server, ServerConfig
from serving.settings import Limits

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{{ opening | default('answer') }}: {% endif %}"
)

GREEDY = {"temperature": 0, "ignore_eos": True}


def run(scenario: Coroutine[Any, Any, None], seconds: float = 60) -> None:
    """A test's body; one that hangs fails."""

    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario

    asyncio.run(bounded())


@asynccontextmanager
async def serving(engine: Engine, limits: Limits | None = None, **config: Any) -> AsyncIterator[Server]:
    """Start, and stop; afterwards no task of the server is left."""
    before = asyncio.all_tasks()
    settings = {"name": "small", "port": 0, "limits": limits or Limits(), **config}
    server = Server(ServerConfig(**settings), lambda: engine)
    await server.listen()
    try:
        await server.load()
        yield server
    finally:
        brake = getattr(engine.step, "__self__", None)
        if isinstance(brake, Brake):
            brake.release()
        await server.stop()
        await until(lambda: len(asyncio.all_tasks() - before) == 0)
        assert server.frontend.admission.num_requests == 0
        assert server.frontend.admission.num_waiting_tokens == 0


@asynccontextmanager
async def connected(
    engine: Engine, limits: Limits | None = None, **config: Any
) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """A server and a client that tries everything once."""
    async with serving(engine, limits, **config) as server, AsyncClient(address(server), max_tries=1) as client:
        yield server, client


def address(server: Server) -> str:
    return f"localhost:{server.port}"


async def until(condition: Any, seconds: float = 20) -> None:
    """Wait for something that takes a moment."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.002)


async def submitted(server: Server, num_requests: int) -> None:
    """Until the engine's thread, which may be held, has so many requests to read or to run."""
    await until(lambda: len(server.frontend.engine.streams) == num_requests)


async def collect(stream: AsyncIterator[Any]) -> tuple[Generation, list[Any]]:
    """A stream's answer put together, and its messages; their numbers are held to be without a gap."""
    whole, messages = Generation(), []
    async for message in stream:
        assert message.seq == len(messages)
        assert message.HasField("prompt") == (not messages)
        assert whole.usage is None, "nothing comes after the usage"
        messages.append(message)
        whole.add(message)
    assert whole.usage is not None
    return whole, messages


async def refused(call: Any, code: str, *words: str) -> grpc.aio.AioRpcError:
    """The call must end with this status and a message that has these words."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code().name == code, error
    for word in words:
        assert word in (error.details() or ""), error.details()
    return error


class Brake:
    """Holds the engine between two steps, or lets it make some; counts them. `fail` makes the next ones raise.

    As a context it lets the engine go at its end, whatever the test came to.
    """

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        self.fail = 0
        self.is_holding = False
        self._step = engine.step
        self._start_over = engine._start_over
        self._may_step = threading.Semaphore(0)
        self._is_free = False
        patch.setattr(engine, "step", self._braked)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def let(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._may_step.release()

    async def held_after(self, num_steps: int) -> None:
        """Until so many steps are over and the engine's thread, having read its commands, is held before the next."""
        await until(lambda: self.num_steps == num_steps and self.is_holding)

    def release(self) -> None:
        self._is_free = True
        self._may_step.release()

    def _braked(self) -> Any:
        if not self._is_free:
            self.is_holding = True
            self._may_step.acquire()
            self.is_holding = False
        try:
            if self.fail:
                self.fail -= 1
                self._start_over("the engine failed: a test pulled the plug")
                raise RuntimeError("a test pulled the plug")
            return self._step()
        finally:
            self.num_steps += 1
