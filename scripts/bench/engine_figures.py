"""Figures of the engine that have a limit, each measured in this process on models with random weights.

overhead      part of a decode step at batch 32, 135 M Llama shape, that is not the device's own time
compilations  programs compiled or loaded on a ragged trace after warm-up
waste         KV-cache positions held and not used, on a trace of mixed lengths
window        bytes that sliding-window layers hold for sequences of 1k to 32k tokens
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np

from jaxinfer.cache.manager import KVCacheManager
from jaxinfer.checkpoint.config import GenerationDefaults
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.loading import LoadedModel
from jaxinfer.metrics.table import format_bytes, format_seconds
from jaxinfer.models.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.model import Model
from jaxinfer.plan import Plan, resolve
from jaxinfer.runner.sent import AwaitedStep, SentStep
from jaxinfer.runner.step_plan import StepPlan
from jaxinfer.scheduler.schedule import SchedulerConfig
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.types import Request, SamplingParams


@dataclass(frozen=True)
class Figure:
    """One row of the table; `fine` is None where there is no limit to hold."""

    name: str
    measured: str
    limit: str
    fine: bool | None


def llama(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    ffn_dim: int,
    vocab_size: int,
    windows: Several[int | None] = (None,),
) -> ModelConfig:
    """A Llama shape; layer i has window windows[i % len(windows)]."""
    rope = RopeConfig(theta=100_000.0, rotary_dim=head_dim)
    layers = tuple(
        LayerConfig(num_heads, num_kv_heads, head_dim, ffn_dim, windows[i % len(windows)], rope)
        for i in range(num_layers)
    )
    return ModelConfig("llama", vocab_size, hidden_size, 32_768, layers)


SHAPE_135M: dict[str, Any] = {
    "num_layers": 30,
    "hidden_size": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "head_dim": 64,
    "ffn_dim": 1536,
    "vocab_size": 49_152,
}
SMALL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 128,
    "vocab_size": 512,
}


def make_engine(config: ModelConfig, **settings: Any) -> Engine:
    model = Model(config)
    loaded = LoadedModel(model, model.init_params(0), make_mesh(None), Path("random weights"), GenerationDefaults())
    return Engine(EngineConfig("random weights", **settings), loaded=loaded)


def add(engine: Engine, name: str, num_tokens: int, params: SamplingParams, seed: int | None = None) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, engine.loaded.config.vocab_size, num_tokens).tolist()
    engine.add_request(Request(name, tuple(prompt), params, arrival_time=time.monotonic()))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


# Host overhead


class DeviceOnly:
    """Sends the programs of an engine's last step again and again, and does nothing else: the device's own time."""

    def __init__(self, engine: Engine) -> None:
        self.runner = engine.runner
        self._send = engine.runner.send
        self._last: StepPlan | None = None
        engine.runner.send = self._remember  # type: ignore[method-assign]

    def _remember(self, step: StepPlan) -> SentStep | AwaitedStep:
        self._last = replace(step, admissions=(), copies=(), scores=())
        return self._send(step)

    def wait(self) -> None:
        """Until all that was sent is computed."""
        self.runner._lanes[0].state.last_tokens.block_until_ready()

    def seconds_per_step(self, count: int) -> float:
        """The pools and the sampler's state are as before: the step writes what it wrote.

        As in the engine, a step is waited for when the next is sent: a queue of steps would have a thread send while
        the device computes, and on few cores that slows the device.
        """
        assert self._last is not None
        self.wait()
        started = time.perf_counter()
        previous = None
        for _ in range(count):
            sent = self.runner.send_own(self._last).sampled
            if previous is not None:
                previous.token_ids.block_until_ready()
            previous = sent
        self.wait()
        return (time.perf_counter() - started) / count


def overhead(batch: int = 32, rounds: int = 12, steps: int = 6) -> Iterator[Figure]:
    """Rounds of engine steps and of the same steps without the engine, in turns; the median of their ratios."""
    config = llama(**SHAPE_135M)
    context = 64  # of one-token prompts: all steps have one token a sequence, so two programs serve them
    engine = make_engine(
        config, max_num_seqs=batch, max_num_batched_tokens=batch, max_model_len=512, num_pages=batch * 32
    )
    for index in range(batch):
        add(engine, str(index), 1, greedy(context + 2 + rounds * steps), seed=index)
    for _ in range(context):
        engine.step()
    device = DeviceOnly(engine)
    engine.step()
    shares, step_seconds = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        device.wait()  # the engine has read all but the last, which the device computes meanwhile
        step_seconds.append((time.perf_counter() - started) / steps)
        shares.append(1 - device.seconds_per_step(steps) / step_seconds[-1])
    share = statistics.median(shares)
    quartiles = statistics.quantiles(shares, n=4)
    yield Figure(
        f"host overhead, batch {batch}, 135 M model, decode step of {format_seconds(statistics.median(step_seconds))}",
        f"{share:.1%} (quartiles {quartiles[0]:.1%} to {quartiles[2]:.1%})",
        "under 5%",
        share < 0.05 if share > -0.02 else None,  # the steps alone took longer: the machine was not still enough to say
    )


# Compilations


def compilations(num_requests: int = 120) -> Iterator[Figure]:
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    config = llama(**SMALL, windows=(32, None))
    engine = make_engine(config, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512, num_pages=100)
    engine.warm_up()
    stats = engine.stats()
    compiled.clear()
    rng = np.random.default_rng(0)
    left = num_requests
    while left or engine.has_unfinished():
        if left and rng.random() < 0.3:
            left -= 1
            params = SamplingParams(
                n=int(rng.integers(1, 4)),
                temperature=float(rng.choice([0.0, 1.0])),
                top_p=float(rng.uniform(0.5, 1.0)),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                max_tokens=int(rng.integers(1, 60)),
                logprobs=5 if rng.random() < 0.3 else None,
                prompt_logprobs=5 if rng.random() < 0.1 else None,
            )
            add(engine, str(left), int(rng.integers(1, 200)), params, seed=left)
        engine.step()
    after = engine.stats()
    yield Figure(
        f"compilations on a ragged trace of {num_requests} requests, {after.num_steps} steps, after a warm-up of "
        f"{stats.num_programs_compiled + stats.num_programs_loaded} programs",
        str(len(compiled)),
        "0",
        not compiled and after.num_programs_compiled == stats.num_programs_compiled,
    )


# What the KV cache holds. The scheduler's and the page manager's books are the engine's own; no model need run.


def run_books(
    plan: Plan, requests: Several[tuple[int, int]], after_step: Callable[[Scheduler, KVCacheManager], None]
) -> None:
    """Schedule requests of (prompt tokens, output tokens) to their ends, as an engine with this plan would."""
    manager = KVCacheManager(
        plan.groups,
        plan.num_pages,
        plan.tokens_per_page,
        plan.table_widths,
        plan.max_num_seqs,
        enable_prefix_caching=False,
    )
    limits = SchedulerConfig(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len)
    scheduler = Scheduler(limits, manager)
    for index, (num_prompt_tokens, num_output_tokens) in enumerate(requests):
        scheduler.add(Sequence(str(index), [0] * num_prompt_tokens, greedy(num_output_tokens)))
    while (schedule := scheduler.schedule()) is not None:
        after_step(scheduler, manager)
        scheduler.commit(schedule, [0] * len(schedule.sampling_rows))
    assert not scheduler.has_unfinished()


def waste(num_requests: int = 512, batch: int = 32) -> Iterator[Figure]:
    """Lengths like those of conversations: log-normal, prompts of 200 tokens in the median, outputs of 150."""
    settings = EngineConfig("none", max_num_seqs=batch, max_model_len=4096, num_pages=batch * 256)
    plan = resolve(settings, llama(**SHAPE_135M), np.dtype(np.float32), make_mesh(None))
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log([200, 150]), [0.9, 0.7], (num_requests, 2)), 8, 2000).astype(int)
    unused = held = most_of_one = 0.0  # in pages

    def note(scheduler: Scheduler, manager: KVCacheManager) -> None:
        nonlocal unused, held, most_of_one
        num_held = manager.usage().num_held
        num_unused = manager.waste() * num_held
        unused, held = unused + num_unused, held + num_held
        most_of_one = max(most_of_one, num_unused / max(scheduler.num_running, 1))

    run_books(plan, [(prompt, output) for prompt, output in lengths.tolist()], note)
    yield Figure(
        f"KV waste, {num_requests} requests of {lengths.sum(1).mean():.0f} tokens (mean), "
        f"pages of {plan.tokens_per_page}",
        f"{unused / held:.1%}",
        "under 4%",
        unused / held < 0.04,
    )
    yield Figure(
        "  a running sequence's part of it, in the step where it is most",
        f"{most_of_one:.2f} pages",
        "1 page",
        most_of_one < 1,
    )


def window(lengths: Several[int] = (1024, 4096, 16_384, 32_768)) -> Iterator[Figure]:
    """Five layers of a window of 512 to one that sees all, as Gemma 3 has them; one sequence at a time."""
    model = llama(**{**SHAPE_135M, "windows": (512, 512, 512, 512, 512, None)})
    settings = EngineConfig("none", max_num_seqs=1, max_num_batched_tokens=256, max_model_len=32_768, num_pages=2048)
    plan = resolve(settings, model, np.dtype(np.float32), make_mesh(None))
    full, ring = plan.groups
    assert (full.window, ring.window) == (None, 512)
    page_bytes = plan.page_bytes[1]
    num_layers = len(ring.layers)
    most = []
    for length in lengths:
        held: list[int] = []
        run_books(plan, [(length - 64, 64)], lambda _, manager, held=held: held.append(manager.pools[1].num_held))
        most.append(max(held) * page_bytes)
        whole = -(-length // plan.tokens_per_page) * page_bytes
        yield Figure(
            f"KV cache of {num_layers} layers with a window of 512, one sequence of {length:,} tokens",
            f"{format_bytes(most[-1])}, {most[-1] / whole:.1%} of a full cache",
            "",
            None,
        )
    growth = most[-1] / most[0]
    yield Figure(
        f"  from {lengths[0]:,} to {lengths[-1]:,} tokens it grows by a factor of", f"{growth:.2f}", "1", growth <= 1
    )


FIGURES: dict[str, Callable[[], Iterator[Figure]]] = {
    "overhead": overhead,
    "compilations": compilations,
    "waste": waste,
    "window": window,
}


def report(only: Several[str] | None = None) -> int:
    """Print the figures as they come. Returns 1 where a limit is passed, else 0."""
    for name in only or ():
        if name not in FIGURES:
            raise ValueError(f"--only {name} is no figure; choose from {', '.join(FIGURES)}")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} processors, {_processor()}, jax {jax.__version__}\n")
    passed = True
    print(f"{'figure':<100} {'measured':<44} {'limit':<10}")
    for name, measure in FIGURES.items():
        if only and name not in only:
            continue
        for figure in measure():
            verdict = {True: "ok", False: "OVER", None: ""}[figure.fine]
            print(f"{figure.name:<100} {figure.measured:<44} {figure.limit:<10} {verdict}".rstrip(), flush=True)
            passed &= figure.fine is not False
    return 0 if passed else 1


def _processor() -> str:
    """The processor's name where the kernel tells it (Linux)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
