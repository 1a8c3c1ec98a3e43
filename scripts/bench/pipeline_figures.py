"""How long m batches take through a pipeline of p stages that is empty at first: m + p - 1 times one stage's time.

Devices are pretended ones. Each stage is sent by a thread of its own, which computes it too (dispatch is synchronous)
and stays on one processor (Linux), so stages overlap where there are as many processors, and they are idle. An engine
sends all stages from one thread; whether that keeps them all busy is not measured here.
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
from jaxinfer.engine import Engine
from jaxinfer.loading import LoadedModel
from jaxinfer.metrics.table import format_seconds
from jaxinfer.models.model import Model
from jaxinfer.runner.batch import pack
from jaxinfer.scheduler.schedule import Schedule, ScheduledRow
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.types import SamplingParams

TOKENS = 128  # of a batch: one prompt


class Pipeline:
    """A model whose stages take equally long: a few wide layers each, next to no vocabulary."""

    def __init__(self, num_stages: int) -> None:
        model = Model(llama(4 * num_stages, 512, 8, 4, 64, 1536, 256))
        mesh = make_mesh({"stage": num_stages})
        loaded = LoadedModel(model, {}, mesh, Path("random weights"), GenerationDefaults())
        loaded.params = loaded.place(model.init_params(0))
        config = EngineConfig(
            "random weights",
            max_num_seqs=1,
            max_num_batched_tokens=TOKENS,
            max_model_len=TOKENS + 1,
            num_pages=TOKENS // 16 + 1,
            compilation_cache_dir=False,
        )
        self._runner = Engine(config, loaded=loaded).runner
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
            flow = None if before is None else before.result()
            return self._runner._run_stage(stage, self._runner._lanes[0], self._layout, self._batch, flow)

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
