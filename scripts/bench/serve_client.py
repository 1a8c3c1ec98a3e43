"""The load of `python scripts/bench serve`, in a process of its own: one JSON line in, one out, and so on.

In: {"address": ..., "requests": [[start in seconds, prompt token ids, max_tokens], ...]}. Out: for each request
[start, [[time, number of tokens], ...], error or null], times in seconds since the first could start.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).parents[2]))

from serving.client import AsyncClient

Outcome = tuple[float, list[tuple[float, int]], str | None]


async def one(client: AsyncClient, origin: float, start: float, prompt: list[int], max_tokens: int) -> Outcome:
    await asyncio.sleep(max(origin + start - time.monotonic(), 0))
    began, arrivals = time.monotonic() - origin, []
    try:
        async for message in client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
            count = sum(len(sequence.token_ids) for sequence in message.sequences)
            if count:
                arrivals.append((time.monotonic() - origin, count))
    except grpc.aio.AioRpcError as error:
        return began, arrivals, error.code().name
    return began, arrivals, None


async def load(address: str, requests: list[Any]) -> list[Outcome]:
    async with AsyncClient(address, max_tries=1) as client:
        await client.models()  # connects
        origin = time.monotonic() + 0.01
        return await asyncio.gather(*(one(client, origin, *request) for request in requests))


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(**json.loads(line)))), flush=True)
