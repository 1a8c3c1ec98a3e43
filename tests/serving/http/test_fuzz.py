"""Mutated bodies, through the whole app: refused or answered, never our mistake.

A run tries a share of what FUZZ_MESSAGES=10000 would: enough to notice a careless change, and quick.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import json
import os
import random
from typing import Any

import httpx

from jaxinfer.engine import Engine
from serving.http.app import make_app
from serving.http.gate import NUM_CONNECTIONS, Gate
from serving.metrics import Metrics
from serving.settings import Limits
from tests.serving.harness import run, serving

NUM_BODIES = int(os.environ.get("FUZZ_MESSAGES", "2000"))
AT_A_TIME = 8

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
SEEDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETIONS, {"model": "small", "prompt": "abc", "max_tokens": 2, "n": 2, "logprobs": 2, "seed": 1}),
    (COMPLETIONS, {"prompt": [[5, 6], [7]], "max_tokens": 1, "logit_bias": {"5": 1.5}, "stop": ["x", "yz"]}),
    (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": "abc", "max_tokens": 1, "prompt_logprobs": 1, "cache_salt": "s", "priority": 1}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 1, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7}),
    (
        COMPLETIONS,
        {"prompt": "a", "max_tokens": 2, "min_tokens": 1, "stop_token_ids": [3], "allowed_token_ids": [3, 4]},
    ),
    (CHAT, {"messages": [HI], "max_tokens": 2, "logprobs": True, "top_logprobs": 1}),
    (CHAT, {"messages": [PARTS], "max_tokens": 1, "stream": True}),
    (CHAT, {"messages": [HI], "max_tokens": 1, "chat_template_kwargs": {"opening": "o"}}),
    ("/tokenize", {"prompt": "abc", "add_special_tokens": False}),
    ("/tokenize", {"messages": [HI], "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [3, 4, 5], "skip_special_tokens": True}),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.0, -0.5, 1e308),
    *("", "x", "\ud800", "\x00", "é" * 50, "null", "x" * 5000, [5] * 200),
    *([], {}, [[]], [None], [{}], {"": 0}, [1, "a"], ["a", 1], [2**70], [-1], [True], {"type": "text"}),
    *({"role": "user"}, [{"role": "user", "content": None}], {"-1": 1}, {"99999999999": 1}),
)
BYTES = (b"", b"\xff", b"{", b"]", b'"', b"\\", b"9" * 5000, b"NaN", b"e9")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    if not isinstance(value, dict | list):
        return []
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in _places(inner)]


def _near(rng: random.Random, value: Any) -> Any:
    """Another value of the same type, which may well be served."""
    match value:
        case bool():
            return not value
        case int():
            return rng.randrange(6)
        case float():
            return round(rng.random(), 2)
        case str():
            return rng.choice(("a", "xyz", "é", value + value))
        case _:
            return copy.deepcopy(value)


def _mutated(rng: random.Random, body: dict[str, Any], names: list[str]) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 2)):
        places = _places(body)
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.5:
            container[key] = _near(rng, container[key])
        elif kind < 0.75:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.85:
            body[rng.choice(names)] = copy.deepcopy(rng.choice(ODD))
        elif isinstance(container, dict):
            del container[key]
        if not body:
            break
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 2)] = rng.choice(BYTES)
    return bytes(data)


def test_mutated_bodies(engine: Engine) -> None:
    rng = random.Random(20)
    names = sorted({key for _, body in SEEDS for key in body} | {"echo", "tools", "best_of", "request_id", "user", "n"})

    statuses: collections.Counter[int] = collections.Counter()

    async def send(client: httpx.AsyncClient) -> None:
        path, body = rng.choice(SEEDS)
        data = _mutated(rng, body, names)
        response = await client.post(path, content=data, headers={"content-type": "application/json"})
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400, 404, 504), (path, data[:2000], response.text)
        if response.status_code == 200:
            assert b'"server_error"' not in response.content, (path, data[:2000], response.text)
        else:
            assert response.json()["error"]["message"]

    async def scenario() -> None:
        async with serving(engine, Limits(max_queued_requests=1000, max_queued_tokens=100_000)) as server:
            frontend = server.frontend
            metrics = Metrics(frontend, True)
            gate = Gate(make_app(frontend, metrics), None, frozenset(), True, 30, frontend.refusals, lambda: 1)

            async def app(scope: Any, receive: Any, send: Any) -> None:
                """As the listener calls it."""
                await gate({**scope, "state": {NUM_CONNECTIONS: lambda: 1}}, receive, send)

            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                numbers = iter(range(NUM_BODIES))

                async def work() -> None:
                    for _ in numbers:
                        await send(client)

                async with asyncio.TaskGroup() as workers:
                    for _ in range(AT_A_TIME):
                        workers.create_task(work())
            assert frontend.healthy

    run(scenario(), 60 + NUM_BODIES / 50)
    assert sum(statuses.values()) == NUM_BODIES
    assert min(statuses[200], statuses[400]) > NUM_BODIES // 5, statuses
