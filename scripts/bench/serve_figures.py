"""What the server costs over the bare engine, and how it bears load that does not wait for it.

overhead   32 streams of 128 tokens that start together, and the first token of one stream alone on an idle server: bare
           engine and server take turns in this process, the clients are in another; ratios and differences of
           neighbouring turns, medians
load       requests of mixed lengths that arrive at random (Poisson) whatever the server does, at several rates: output
           tokens per second, time to first token (TTFT), time between tokens (ITL: a message's tokens share the time
           since the message before), and goodput, the part of all requests that kept to the objective
overload   four times the requests that the engine can serve, for as long as is asked: how soon those too many hear
           so, what the accepted ones wait, and the process's memory when they begin, half-way and when they end
"""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as Several
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from jaxinfer.config import EngineConfig, default_model
from jaxinfer.engine import Engine
from jaxinfer.types import Request, SamplingParams
from serving.engine_loop import give_way
from serving.server import Server, ServerConfig, settle

NUM_STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 32, 128
PAUSE = 0.1  # seconds before a request that is alone
NUM_PAIRS = 50  # of such requests
# The objective that goodput counts by, in seconds.
MAX_TTFT, MAX_ITL = 0.5, 0.05
MAX_REFUSAL = 0.05
RATES = (0.25, 0.5, 0.75, 1.0, 1.5)  # of what the bare engine does

Item = tuple[float, list[int], int]  # start in seconds, prompt, max_tokens


@dataclass(frozen=True)
class Answers:
    """What the clients saw of a run: per request, its TTFT and ITLs in seconds (None: refused), and totals.

    refusals: seconds until a refused request heard so. empty: seconds that a call without work took before the run.
    client_cpu, server_cpu: seconds of processor time that the clients, and this process meanwhile, took.
    """

    ttft: list[float | None]
    itl: list[list[float]]
    refusals: list[float]
    empty: float
    client_cpu: float
    server_cpu: float
    num_tokens: int
    num_messages: int
    seconds: float

    @property
    def goodput(self) -> float:
        """Part of the requests whose TTFT and mean ITL kept to the objective; a refused one did not."""
        kept = [
            first is not None and first <= MAX_TTFT and statistics.fmean(gaps or [0.0]) <= MAX_ITL
            for first, gaps in zip(self.ttft, self.itl, strict=True)
        ]
        return sum(kept) / len(kept)


@dataclass(frozen=True)
class Row:
    """A rate of arrival, in requests per second, and what came of it; percentiles are those of 50, 95 and 99, in ms."""

    rate: float
    throughput: float
    ttft: list[float]
    itl: list[float]
    goodput: float


class Clients:
    """serve_client.py, started once."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("serve_client.py")
        self._process = subprocess.Popen([sys.executable, str(script)], stdin=-1, stdout=-1, text=True)
        self._read()

    def close(self) -> None:
        self._process.communicate()

    def run(self, address: str, requests: Several[Item]) -> Answers:
        assert self._process.stdin is not None
        print(json.dumps({"address": address, "requests": requests}), file=self._process.stdin, flush=True)
        cpu = time.process_time()
        answer = json.loads(self._read())
        cpu = time.process_time() - cpu
        ttft, itl, refusals, outcomes = [], [], [], answer["requests"]
        for start, arrivals, end, error in outcomes:
            if error not in (None, "RESOURCE_EXHAUSTED"):
                raise RuntimeError(f"a request ended with {error}")
            if error is not None:
                refusals.append(end - start)
            ttft.append(arrivals[0][0] - start if arrivals else None)
            pairs = itertools.pairwise(arrivals)
            itl.append([(now - before) / count for (before, _), (now, count) in pairs for _ in range(count)])
        answered = [arrivals for _, arrivals, _, _ in outcomes if arrivals]
        return Answers(
            ttft=ttft,
            itl=itl,
            refusals=refusals,
            empty=answer["empty"],
            client_cpu=answer["cpu"],
            server_cpu=cpu,
            num_tokens=sum(count for arrivals in answered for _, count in arrivals),
            num_messages=sum(map(len, answered)),
            seconds=max(arrivals[-1][0] for arrivals in answered) - min(start for start, _, _, _ in outcomes),
        )

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process has ended; its lines above say why")
        return line


def bare(engine: Engine, requests: Several[Item]) -> tuple[float, float]:
    """(output tokens per second, median TTFT) of the engine alone, all requests there from the beginning."""
    started = time.monotonic()
    outputs = [
        engine.add_request(
            Request(
                f"bare-{number}",
                tuple(prompt),
                SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
                arrival_time=started,
            )
        )
        for number, (_, prompt, max_tokens) in enumerate(requests)
    ]
    while engine.has_unfinished():
        engine.step()
    seconds = time.monotonic() - started
    first = [output.metrics.time_to_first_token or 0.0 for output in outputs]
    return sum(max_tokens for _, _, max_tokens in requests) / seconds, statistics.median(first)


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Server]:
    server = Server(ServerConfig("bench", port=0), lambda: engine)
    await server.listen()
    await server.load()
    try:
        yield server
    finally:
        await server.stop()


def served(engine: Engine, clients: Clients, requests: Several[Item]) -> Answers:
    async def run() -> Answers:
        async with running(engine) as server:
            return await asyncio.to_thread(clients.run, f"localhost:{server.port}", requests)

    return asyncio.run(run())


def first_tokens(engine: Engine, clients: Clients, prompts: Several[list[int]]) -> list[tuple[float, float]]:
    """(seconds that the server adds to the TTFT of a request that finds it idle, seconds that an empty call takes) for
    each pair of prompts. The first of a pair is the bare engine's, in the thread that it has in the server, after the
    same pause: what else the machine does is then most likely to slow both.
    """

    async def run() -> list[tuple[float, float]]:
        found = []
        async with running(engine) as server:
            for own, other in zip(prompts[::2], prompts[1::2], strict=True):
                await asyncio.sleep(PAUSE)
                _, first = await server.frontend.engine.call(partial(bare, requests=[(0.0, own, 4)]))
                answers = await asyncio.to_thread(clients.run, f"localhost:{server.port}", [(PAUSE, other, 4)])
                found.append((_median_ttft(answers) - first, answers.empty))
        return found

    return asyncio.run(run())


def overhead(engine: Engine, clients: Clients, rounds: int) -> float:
    """Prints throughput and TTFT against the bare engine's. Returns the bare engine's tokens per second."""
    rng = np.random.default_rng(0)

    def streams() -> list[Item]:
        return [(0.0, prompt, OUTPUT_TOKENS) for prompt in _prompts(engine, rng, [PROMPT_TOKENS] * NUM_STREAMS)]

    def alone() -> tuple[float, float, float]:
        """Tokens per second, seconds until the median first token, and seconds of processor time."""
        cpu = time.process_time()
        rate, first = bare(engine, streams())
        return rate, first, time.process_time() - cpu

    alone()
    served(engine, clients, streams())
    turns, ratios, messages, added, work = [alone()], [], [], [], []
    for _ in range(rounds):
        answers = served(engine, clients, streams())
        turns.append(alone())
        rate, first, cpu = (statistics.fmean(pair) for pair in zip(*turns[-2:], strict=True))
        ratios.append(answers.num_tokens / answers.seconds / rate)
        added.append(_median_ttft(answers) - first)
        work.append((answers.server_cpu / cpu - 1, answers.client_cpu / cpu))
        messages.append(answers.num_tokens / answers.num_messages)
    rate, ratio = statistics.median(rate for rate, _, _ in turns), statistics.median(ratios)
    print(f"bare engine, {NUM_STREAMS} streams of {OUTPUT_TOKENS} tokens: {rate:.0f} tokens/s")
    each = ", ".join(f"{100 * own:.0f}%" for own in sorted(ratios))
    print(f"served over gRPC: {100 * ratio:.1f}% of that (limit 90%; rounds: {each})")
    server, client = (100 * statistics.median(part) for part in zip(*work, strict=True))
    print(
        f"processor time, of the bare engine's: the server {server:+.1f}%, the clients on the same cores {client:.1f}%"
    )
    print(f"tokens in a message: {statistics.median(messages):.1f}")
    each = ", ".join(f"{1000 * own:+.0f}" for own in sorted(added))
    print(f"first tokens of streams that start together: {1000 * statistics.median(added):+.0f} ms (rounds: {each})")
    more, empty = zip(*first_tokens(engine, clients, _prompts(engine, rng, [64] * 2 * NUM_PAIRS)), strict=True)
    low, middle, high = (1000 * np.percentile(more, (25, 50, 75))).tolist()
    half = f"half of {NUM_PAIRS}: {low:+.1f} to {high:+.1f}"
    print(f"first token of one stream alone: {middle:+.1f} ms (limit +5 ms; {half})")
    print(f"an empty call: {1000 * statistics.median(empty):.1f} ms")
    return rate


def _median_ttft(answers: Answers) -> float:
    return statistics.median(first for first in answers.ttft if first is not None)


def load(engine: Engine, clients: Clients, seconds: float, tokens_per_second: float, plot: str | None) -> None:
    """Prints a row for each rate of arrival."""
    rng = np.random.default_rng(1)
    print(
        f"\nPoisson arrivals for {seconds:g} s, prompts of 8 to 256 tokens, outputs of 8 to 192 (log-uniform)\n"
        f"goodput: TTFT under {1000 * MAX_TTFT:.0f} ms and mean ITL under {1000 * MAX_ITL:.0f} ms"
    )
    print("requests/s  refused  tokens/s     TTFT p50/p95/p99 ms       ITL p50/p95/p99 ms  goodput")
    rows = []
    for part in RATES:
        rate, requests = _arrivals(engine, rng, part * tokens_per_second, seconds)
        answers = served(engine, clients, requests)
        row = Row(
            rate=rate,
            throughput=answers.num_tokens / answers.seconds,
            ttft=_percentiles([first for first in answers.ttft if first is not None]),
            itl=_percentiles([gap for gaps in answers.itl for gap in gaps]),
            goodput=answers.goodput,
        )
        rows.append(row)
        print(
            f"{rate:10.1f} {answers.ttft.count(None):8d} {row.throughput:9.0f}  {_three(row.ttft)}  {_three(row.itl)}"
            f"  {100 * row.goodput:6.0f}%"
        )
    if plot is not None:
        _plot(rows, plot)


def overload(engine: Engine, clients: Clients, seconds: float) -> None:
    """Prints what clients see of the load that the engine can bear, and of four times it."""
    rng = np.random.default_rng(2)
    tokens_per_second = max(bare(engine, _arrivals(engine, rng, 1e4, 1)[1][:128])[0] for _ in range(2))
    print(f"bare engine, requests of mixed lengths: {tokens_per_second:.0f} tokens/s\n")
    print("    load  requests  refused  refusal p50/p95/p99 ms         TTFT p50/p95/p99 ms       ITL p50/p95/p99 ms")
    for part, own_seconds in ((1.0, 8.0), (4.0, seconds)):
        _, requests = _arrivals(engine, rng, part * tokens_per_second, own_seconds)
        memory = MemoryWatch(own_seconds)
        answers = served(engine, clients, requests)
        ttft = [first for first in answers.ttft if first is not None]
        itl = [gap for gaps in answers.itl for gap in gaps]
        refusals = _three(_percentiles(answers.refusals)) if answers.refusals else "-".rjust(27)
        print(
            f"{part:7.2f}x {len(requests):9d} {len(answers.refusals):8d}  {refusals}  {_three(_percentiles(ttft))}"
            f"  {_three(_percentiles(itl))}  {answers.num_tokens / answers.seconds:.0f} tokens/s"
        )
        print(f"         memory when arrivals begin, half-way and when they end: {memory.three()} MiB", end="")
        late = sum(refusal > MAX_REFUSAL for refusal in answers.refusals)
        print(f"; refusals after more than {1000 * MAX_REFUSAL:.0f} ms: {late}" if answers.refusals else "")
    rate, _ = bare(engine, _arrivals(engine, rng, 1e4, 1)[1][:128])
    print(f"\nbare engine afterwards: {rate:.0f} tokens/s")


class MemoryWatch:
    """Looks at this process's memory at the beginning, middle and end of so many seconds that follow."""

    def __init__(self, seconds: float) -> None:
        self._thread = threading.Thread(target=self._look, args=(seconds / 2,))
        self._seen: list[float] = []
        self._thread.start()

    def three(self) -> str:
        """MiB, once the time is over."""
        self._thread.join()
        return " / ".join(f"{mib:.0f}" for mib in self._seen)

    def _look(self, pause: float) -> None:
        for number in range(3):
            time.sleep(pause if number else 0)
            self._seen.append(resident_mib())


def resident_mib() -> float:
    """Memory of this process, which is engine and server."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def _arrivals(
    engine: Engine, rng: np.random.Generator, tokens_per_second: float, seconds: float
) -> tuple[float, list[Item]]:
    """(requests per second, requests) of log-uniform lengths whose outputs add up to about so many tokens."""
    rate = tokens_per_second / _mean_length(8, 192)
    starts = np.cumsum(rng.exponential(1 / rate, max(round(rate * seconds), 2))).tolist()
    lengths = np.exp(rng.uniform(np.log(8), np.log([256, 192]), (len(starts), 2))).astype(int).tolist()
    prompts = _prompts(engine, rng, [length for length, _ in lengths])
    return rate, [(start, prompt, own[1]) for start, prompt, own in zip(starts, prompts, lengths, strict=True)]


def _plot(rows: list[Row], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [row.rate for row in rows]
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), sharex=True)
    panels[0, 0].plot(rates, [row.throughput for row in rows], marker="o")
    panels[0, 1].plot(rates, [100 * row.goodput for row in rows], marker="o")
    for panel, several in ((panels[1, 0], [row.ttft for row in rows]), (panels[1, 1], [row.itl for row in rows])):
        for place, name in enumerate(("p50", "p95", "p99")):
            panel.plot(rates, [own[place] for own in several], marker="o", label=name)
        panel.set_yscale("log")
        panel.legend()
    for panel, title in zip(
        panels.flat,
        ("output tokens/s", "goodput, %", "time to first token, ms", "time between tokens, ms"),
        strict=True,
    ):
        panel.set_title(title)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("requests per second")
    figure.tight_layout()
    figure.savefig(path)
    print(f"\nplot: {path}")


def _prompts(engine: Engine, rng: np.random.Generator, lengths: Several[int]) -> list[list[int]]:
    """Random ones, so that nothing is found in the prefix cache."""
    return [rng.integers(3, engine.loaded.config.vocab_size, length).tolist() for length in lengths]


def _mean_length(low: int, high: int) -> float:
    """Of a log-uniform length."""
    return (high - low) / float(np.log(high / low))


def _percentiles(seconds: list[float]) -> list[float]:
    return (1000 * np.percentile(seconds, (50, 95, 99))).tolist()


def _three(values: list[float]) -> str:
    return " / ".join(f"{value:7.1f}" for value in values)


def report(model: str | None, rounds: int, seconds: float, plot: str | None, overload_seconds: float | None) -> int:
    """Run everything, or the overload alone where its seconds are given, and print it. ValueError for no matplotlib."""
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib; pip install 'jaxinfer[bench]'")
    config = EngineConfig(model or str(default_model()), max_num_seqs=NUM_STREAMS)
    with ThreadPoolExecutor(1, initializer=give_way) as opener:  # XLA's threads are those of a server
        engine = opener.submit(Engine, config).result()
    engine.warm_up()
    settle()
    print(f"{engine.loaded.directory.name} on {platform.processor() or platform.machine()}\n{engine.plan.describe()}\n")
    clients = Clients()
    try:
        if overload_seconds is not None:
            overload(engine, clients, overload_seconds)
            return 0
        tokens_per_second = overhead(engine, clients, rounds)
        load(engine, clients, seconds, tokens_per_second, plot)
    finally:
        clients.close()
    return 0
