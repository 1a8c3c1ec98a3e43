"""How long m batches take through a pipeline of p stages that is empty at first: m + p - 1 times one stage's time.

Devices are pretended ones. Each stage is sent by a thread of its own, which computes it too (dispatch is synchronous)
and stays on one processor (Linux), so stages overlap where there are as many processors, and they are idle.

An engine sends all stages from one thread, and waits for none: what it reaches with so many lanes busy is measured by
itself, with dispatch that does not wait either.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from engine_figures import llama

from jaxinfer.checkpoint.config import GenerationDefaults
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine, make_request
from jaxinfer.loading import LoadedModel
from jaxinfer.metrics.table import format_seconds
from jaxinfer.models.model import Model
from jaxinfer.runner.batch import pack
from jaxinfer.runner.sent import SentStep
from jaxinfer.runner.step_plan import StepPlan
from jaxinfer.scheduler.schedule import Schedule, ScheduledRow
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.types import SamplingParams

TOKENS = 128  # of a batch: one prompt


def make_engine(num_stages: int, **sizes: Any) -> Engine:
    """Of a model whose stages take equally long: a few wide layers each, next to no vocabulary."""
    model = Model(llama(4 * num_stages, 512, 8, 4, 64, 1536, 256))
    mesh = make_mesh({"stage": num_stages})
    loaded = LoadedModel(model, {}, mesh, Path("random weights"), GenerationDefaults())
    loaded.params = loaded.place(model.init_params(0))
    return Engine(EngineConfig("random weights", compilation_cache_dir=False, **sizes), loaded=loaded)


class Pipeline:
    """The stages of an engine's runner, each with a thread."""

    def __init__(self, num_stages: int) -> None:
        self._runner = make_engine(
            num_stages,
            max_num_seqs=1,
            max_num_batched_tokens=TOKENS,
            max_model_len=TOKENS + 1,
            num_pages=TOKENS // 16 + 1,
        ).runner
        self._num_stages = num_stages
        self._layout = self._runner._programs[0].layout(TOKENS)
        row = ScheduledRow(Sequence("0", [7] * TOKENS, SamplingParams()), 0, 0, TOKENS, True, -1, 0, True)
        step = Schedule((row,), (row,), (), 0, TOKENS, 0, ())
        tables = [1 + np.arange(width, dtype=np.int32)[None] for width in self._layout.table_widths]
        self._batch = pack(step, tables, self._layout)[None]
        processors = sorted(os.sched_getaffinity(0))
        if len(processors) < num_stages:
            raise ValueError(
                f"{num_stages} stages on {len(processors)} processors can not overlap; use --stages {len(processors)}"
            )
        self._threads = [
            ThreadPoolExecutor(1, initializer=os.sched_setaffinity, initargs=(0, {processor}))
            for processor in processors[:num_stages]
        ]

    def seconds(self, count: int) -> float:
        """From the sending of the first of `count` batches to the end of the last; all write the same pages."""
        started = time.perf_counter()
        flows: list[Future[Any]] = [self._send(0, None) for _ in range(count)]
        for stage in range(1, self._num_stages):
            flows = [self._send(stage, flow) for flow in flows]
        jax.block_until_ready([flow.result() for flow in flows])
        return time.perf_counter() - started

    def _send(self, stage: int, before: Future[Any] | None) -> Future[Any]:
        def send() -> Any:
            lane = self._runner._lanes[0]
            flow = self._runner._last_tokens(lane, None) if before is None else before.result()
            return self._runner._run_stage(stage, lane, self._layout, self._batch, flow)

        return self._threads[stage].submit(send)


def report(num_stages: int, counts: Several[int] = (1, 2, 4, 8), rounds: int = 9) -> int:
    """Print how long the batches take, and the idle share of the stages, beside the formulas. The fastest round counts:
    others had less of the machine."""
    pipeline = Pipeline(num_stages)
    pipeline.seconds(2)  # compiles
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            times[count].append(pipeline.seconds(count))
    stage = min(times[1]) / num_stages
    print(f"{num_stages} stages on {os.cpu_count()} processors, jax {jax.__version__}, {rounds} rounds")
    print(f"one batch of {TOKENS} tokens takes {format_seconds(stage)} a stage\n")
    print(" batches    fastest     median  stage times  m+p-1    idle  (p-1)/(m+p-1)")
    for count, own in times.items():
        slots, fastest = count + num_stages - 1, min(own)
        print(
            f"{count:>8} {format_seconds(fastest):>10} {format_seconds(statistics.median(own)):>10} "
            f"{fastest / stage:>12.2f} {slots:>6} {1 - count * stage / fastest:>7.1%} {(num_stages - 1) / slots:>14.1%}"
        )
    return 0


ROWS = 32  # sequences of a lane that is busy
STEPS = 40  # of each lane, in a round


class Watch:
    """Around an engine's runner: when each stage was done with each step. A stage is busy from when it has all it needs
    and is free to when it is done; sampling is the last one's."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine.runner
        self._send, self._run_stage = self._runner.send, self._runner._run_stage
        self._threads = [ThreadPoolExecutor(1) for _ in engine.plan.stages]
        self._steps: list[tuple[int, float, list[Future[float]]]] = []  # lane, when it was sent, when a stage was done
        self.sending = 0.0

    def __enter__(self) -> Watch:
        self._runner.send, self._runner._run_stage = self.send, self.run_stage  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.send, self._runner._run_stage = self._send, self._run_stage

    def send(self, step: StepPlan) -> SentStep:
        started = time.perf_counter()
        self._steps.append((step.lane, started, []))
        sent = self._send(step)
        assert isinstance(sent, SentStep)
        assert sent.sampled is not None
        self._note(len(self._threads) - 1, sent.sampled.token_ids)
        self.sending += time.perf_counter() - started
        return sent

    def run_stage(self, stage: int, *arguments: Any) -> Any:
        flow = self._run_stage(stage, *arguments)
        if stage < len(self._threads) - 1:
            self._note(stage, flow[0])
        return flow

    def _note(self, stage: int, result: jax.Array) -> None:
        def done() -> float:
            result.block_until_ready()
            return time.perf_counter()

        self._steps[-1][2].append(self._threads[stage].submit(done))

    def busy_seconds(self) -> float:
        """Of all stages together."""
        total, free, tokens = 0.0, [0.0] * len(self._threads), dict[int, float]()
        for lane, sent, dones in self._steps:
            ready = max(sent, tokens.get(lane, 0.0))
            for stage, done in enumerate(dones):
                total += done.result() - max(ready, free[stage])
                ready = free[stage] = done.result()
            tokens[lane] = ready
        return total


def report_engine(num_stages: int, rounds: int = 5) -> int:
    """Print how many tokens a second an engine decodes with one lane busy, with two, and so on; the fastest round
    counts. Sending: the part of the time in which its thread sends; in the rest it waits for tokens or keeps books."""
    engine = make_engine(
        num_stages, max_num_seqs=ROWS, max_num_batched_tokens=ROWS, max_model_len=2 * STEPS, num_pages=6 * ROWS
    )
    figures: dict[int, list[tuple[float, float, float]]] = {lanes: [] for lanes in range(1, num_stages + 1)}
    decode(engine, num_stages)  # compiles
    for _ in range(rounds):
        for lanes, own in figures.items():
            own.append(decode(engine, lanes))
    print(f"{num_stages} stages on {os.cpu_count()} processors, jax {jax.__version__}, {rounds} rounds\n")
    print(f"  lanes of {ROWS}   tokens/s  of one lane  stages busy   sending")
    alone = max(figures[1])[0]
    for lanes, own in figures.items():
        rate, busy, sending = max(own)
        print(f"{lanes:>13} {rate:>10,.0f} {rate / alone:>12.2f} {busy / num_stages:>12.0%} {sending:>9.0%}")
    return 0


def decode(engine: Engine, lanes: int) -> tuple[float, float, float]:
    """Tokens a second of steps in which every row of so many lanes decodes; how many stages were busy, and which part
    of the time steps were being sent."""
    params = SamplingParams(temperature=0, n=ROWS, max_tokens=STEPS + 8, ignore_eos=True)
    for lane in range(lanes):  # a request's samples share a lane
        engine.add_request(make_request(engine, str(lane), [7, 8], params))
    for _ in range(4 * lanes):
        engine.step()
    with Watch(engine) as watch:
        started = time.perf_counter()
        for _ in range(STEPS * lanes):
            engine.step()
        seconds = time.perf_counter() - started
        busy = watch.busy_seconds()
    while engine.has_unfinished():
        engine.step()
    return ROWS * STEPS * lanes / seconds, busy / seconds, watch.sending / seconds
