"""Thousands of mutated bodies, through the whole app: refused or answered, never our mistake."""

from __future__ import annotations

import copy
import json
import random
import time
from typing import Any

import httpx

from jaxinfer.engine import Engine
from serving.http.app import make_app
from serving.http.gate import Gate
from serving.metrics import Metrics
from tests.serving.harness import run, serving

COUNT, SECONDS = 3000, 20.0

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


def _mutated(rng: random.Random, body: dict[str, Any], names: list[str]) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        places = _places(body)
        container, key = rng.choice(places)
        kind = rng.random()
        if kind < 0.5:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.8:
            body[rng.choice(names)] = copy.deepcopy(rng.choice(ODD))
        elif isinstance(container, dict):
            del container[key]
        if not body:
            break
    data = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 2)] = rng.choice(BYTES)
    return bytes(data)


def test_mutated_bodies(engine: Engine) -> None:
    rng = random.Random(20)
    names = sorted({key for _, body in SEEDS for key in body} | {"echo", "tools", "best_of", "request_id", "user", "n"})

    async def scenario() -> None:
        statuses: dict[int, int] = {}
        async with serving(engine) as server:
            frontend = server.frontend
            app = Gate(make_app(frontend, Metrics(frontend, True)), None, frozenset(), True, 30)
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            started = time.monotonic()
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for _ in range(COUNT):
                    path, body = rng.choice(SEEDS)
                    data = _mutated(rng, body, names)
                    response = await client.post(path, content=data, headers={"content-type": "application/json"})
                    status = response.status_code
                    statuses[status] = statuses.get(status, 0) + 1
                    assert status in (200, 400, 404, 504), (path, data[:2000], response.text)
                    if status == 200:
                        assert b'"server_error"' not in response.content, (path, data[:2000], response.text)
                    else:
                        assert response.json()["error"]["message"]
                    if time.monotonic() - started > SECONDS:
                        break
            assert frontend.healthy
        assert sum(statuses.values()) > 500, statuses
        assert statuses[200] > 50, statuses
        assert statuses[400] > 200, statuses

    run(scenario())
