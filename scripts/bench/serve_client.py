"""The load of `python scripts/bench serve`, in a process of its own: one JSON line in, one out, and so on.

In: {"address": ..., "requests": [[start in seconds, prompt token ids, max_tokens], ...]}. Out: {"cpu": seconds of this
process's processor time, "empty": seconds that a call without work took, "requests": for each [start, [[time, number
of tokens], ...], end, error or null], times in seconds since the first could start}.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import grpc

sys.path.insert(0, str(Path(__file__).parents[2]))

from serving.client import AsyncClient

Outcome = tuple[float, list[tuple[float, int]], float, str | None]

_NUM_EMPTY, _EMPTY_PAUSE = 5, 0.02


async def one(client: AsyncClient, origin: float, prompt: list[int], max_tokens: int) -> Outcome:
    began, arrivals = time.monotonic() - origin, []
    try:
        async for message in client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
            count = sum(len(sequence.token_ids) for sequence in message.sequences)
            if count:
                arrivals.append((time.monotonic() - origin, count))
    except grpc.aio.AioRpcError as error:
        return began, arrivals, time.monotonic() - origin, error.code().name
    return began, arrivals, time.monotonic() - origin, None


async def empty_call(client: AsyncClient) -> float:
    await asyncio.sleep(_EMPTY_PAUSE)
    began = time.monotonic()
    await client.models()
    return time.monotonic() - began


async def load(address: str, requests: list[Any]) -> dict[str, Any]:
    async with AsyncClient(address, max_tries=1) as client:
        await client.models()  # connects
        empty = [await empty_call(client) for _ in range(_NUM_EMPTY)]
        calls: list[asyncio.Task[Outcome]] = []
        cpu, origin = time.process_time(), time.monotonic()
        for start, prompt, max_tokens in requests:
            if (pause := origin + start - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            calls.append(asyncio.create_task(one(client, origin, prompt, max_tokens)))
        outcomes = await asyncio.gather(*calls)
        return {"cpu": time.process_time() - cpu, "empty": statistics.median(empty), "requests": outcomes}


if __name__ == "__main__":
    gc.disable()  # its pauses would count as the server's
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asyncio.run(load(**json.loads(line)))), flush=True)
