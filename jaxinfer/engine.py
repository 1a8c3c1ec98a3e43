"""The engine: add, step, abort. The only place that wires scheduler, runner, tokenizer and checkpoint together.

A step sends the next batch to the device before it reads the tokens of the last one (they stay on the device, where
the next batch takes them from); a request that turns out to have ended has computed one token too many, which is
dropped. Where the model is in stages, lanes of requests (scheduler/shards.py) take turns with steps. One thread at a
time may use an engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.cache.manager import KVCacheManager
from jaxinfer.config import EngineConfig
from jaxinfer.distributed.lead import Lead, lead
from jaxinfer.loading import LoadedModel, load_model
from jaxinfer.metrics import EngineMetrics, EngineStats
from jaxinfer.models.layout import check_layout
from jaxinfer.models.model import Params
from jaxinfer.outputs import RequestState
from jaxinfer.plan import resolve
from jaxinfer.quantization import choose
from jaxinfer.runner.runner import Runner
from jaxinfer.runner.sent import PendingStep, StepResult
from jaxinfer.scheduler.schedule import Schedule, SchedulerConfig
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.scheduler.shards import ShardedScheduler
from jaxinfer.sharding.spmd import spans_processes
from jaxinfer.tokenizer import IncrementalDetokenizer, Tokenizer
from jaxinfer.types import Request, RequestOutput, SamplingParams, check_against_vocabulary

log = logging.getLogger(__name__)

_COUNT_EXPERTS_EVERY = 512  # steps: the device is waited for once more, and its counts hold 2 ** 32 choices


class Engine:
    """Continuous batching over one model.

    loaded: a model that is already in memory, instead of config.model. mesh: a jax Mesh, instead of config.mesh.
    """

    def __init__(self, config: EngineConfig, loaded: LoadedModel | None = None, mesh: Mesh | None = None) -> None:
        self.config = config
        if loaded is not None and (mesh is not None or config.mesh is not None):
            raise ValueError(f"mesh={mesh or config.mesh} is given, but the model is loaded already; load it onto that")
        self._lead = _lead(config, mesh if loaded is None else loaded.mesh)
        if loaded is not None and choose(config.quantization, loaded.config.quantization) != loaded.config.quantization:
            raise ValueError(f"quantization={config.quantization!r}: the model is loaded already, without; load it so")
        self.loaded = loaded or load_model(
            config.model, mesh=mesh or config.mesh, dtype=config.dtype, quantization=config.quantization
        )
        check_layout(self.loaded.config, self.loaded.mesh)
        self.plan = resolve(config, self.loaded.config, self.loaded.model.dtype, self.loaded.mesh)
        log.info("%s", self.plan.describe())
        kept_in = config.compilation_cache_path
        if self._lead is not None:
            self._lead.share_plan(self.plan.num_pages, repr(self.plan))
            kept_in = None
        self.metrics = EngineMetrics(self.plan.kv_cache_bytes)
        self.runner = Runner(*self.loaded.serving_form(), self.plan, self.metrics, kept_in, self._lead)
        if self._lead is not None:
            self._lead.wait_for_all()
        self._num_added = 0
        self._open_books()

    def _open_books(self) -> None:
        plan = self.plan
        limits = SchedulerConfig(plan.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len)
        self.scheduler = ShardedScheduler(
            [
                Scheduler(
                    limits,
                    KVCacheManager(
                        plan.groups,
                        plan.num_pages,
                        plan.tokens_per_page,
                        plan.table_widths,
                        plan.max_num_seqs,
                        plan.enable_prefix_caching,
                    ),
                )
                for _ in range(plan.num_lanes * plan.num_shards)
            ],
            plan.num_lanes,
        )
        self._requests: dict[str, RequestState] = {}
        self._in_flight: list[PendingStep | None] = [None] * plan.num_lanes
        self._lane = 0  # whose turn was last
        self._num_preemptions = 0
        self._expert_tokens: dict[int, np.ndarray] = {}  # as the runner told last
        self._steps_to_count = _COUNT_EXPERTS_EVERY

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read on first use; ValueError where the directory has none."""
        return Tokenizer(self.loaded.directory)

    def warm_up(self) -> None:
        """Compile, or load, every program that serving can need; afterwards nothing compiles."""
        self.runner.warm_up()
        if self._lead is not None:
            self._lead.wait_for_all()

    def add_request(self, request: Request) -> RequestOutput:
        """Queue a request. Returns its output, which the steps to come bring up to date.

        ValueError, naming value, limit and fix, for one that could never run.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is already running; give every request its own")
        params, vocab_size = request.sampling_params, self.loaded.config.vocab_size
        eos_token_ids = self.loaded.generation.eos_token_ids
        check_against_vocabulary(params, vocab_size, eos_token_ids)
        if not request.prompt_token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"prompt token id {token_id} is outside the vocabulary; use 0 to {vocab_size - 1}")
        texts = [self._detokenizer(request) for _ in range(params.n)]
        seed = params.seed
        if seed is None:
            seed = int(np.random.SeedSequence([self.plan.seed, self._num_added]).generate_state(1)[0])
        sequences = [
            Sequence(
                request_id=request.request_id,
                token_ids=list(request.prompt_token_ids),
                params=params,
                eos_token_ids=frozenset(eos_token_ids),
                sample_index=index,
                seed=seed,
                priority=request.priority,
                arrival_time=request.arrival_time,
                cache_salt=request.cache_salt,
                compute_all_prompt=params.prompt_logprobs is not None and index == 0,
            )
            for index in range(params.n)
        ]
        self.scheduler.add(*sequences)
        self._num_added += 1
        self.metrics.request_added(len(request.prompt_token_ids))
        state = self._requests[request.request_id] = RequestState(request, sequences, texts, self._decode_token)
        return state.output

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its pages and its place are free at once. None where there is no such request."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return None
        self.scheduler.abort(request_id)
        state.finish(time.monotonic(), self.metrics)
        self._set_gauges()
        return state.output

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Send a lane's next batch, then read its last one: the requests that got tokens or ended by it.

        What is raised here, an interrupt included, has ended every request with an error; the engine goes on empty.
        """
        try:
            return self._step()
        except BaseException as error:
            self._start_over(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _step(self) -> list[RequestOutput]:
        started = time.monotonic()
        lane = self._lane = self._next_lane()
        schedules = self.scheduler.schedule(started, lane)
        sent = None
        if schedules is not None:
            sent = self.runner.execute(lane, schedules, self.scheduler.tables(lane))
            self._note_first_scheduled(schedules)
        previous, self._in_flight[lane] = self._in_flight[lane], sent
        if previous is None:
            return []
        outputs, waited = self._commit(lane, previous)
        waited += 0.0 if sent is None else sent.waited
        self._steps_to_count -= 1
        if self._steps_to_count <= 0 or not any(self._in_flight):
            self._count_experts()
        stats = self.scheduler.stats()
        self.metrics.preempted(stats.num_preemptions - self._num_preemptions)
        self._num_preemptions = stats.num_preemptions
        seconds = time.monotonic() - started
        self.metrics.step_finished(
            seconds=seconds,
            host_seconds=seconds - waited,
            num_prefill_tokens=sum(schedule.num_prefill_tokens for schedule in previous.schedules),
            num_decode_tokens=sum(schedule.num_decode_tokens for schedule in previous.schedules),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv.num_held / max(stats.kv.num_pages, 1),
        )
        return outputs

    def _next_lane(self) -> int:
        """The lane whose turn it is: the next that has something to send or to read."""
        count = len(self._in_flight)
        for lane in (*range(self._lane + 1, count), *range(self._lane + 1)):
            if self._in_flight[lane] is not None or self.scheduler.has_unfinished(lane):
                return lane
        return self._lane

    def _count_experts(self) -> None:
        self._steps_to_count = _COUNT_EXPERTS_EVERY
        for layer, num_tokens in self.runner.expert_tokens().items():
            more = num_tokens - self._expert_tokens.get(layer, np.uint32(0))
            self.metrics.experts_chosen(layer, more.tolist())
            self._expert_tokens[layer] = num_tokens

    def stats(self) -> EngineStats:
        return self.metrics.snapshot()

    def update_params(self, params: Params) -> None:
        """Swap the weights. Running requests keep the tokens they have and go on under the new weights.

        ValueError where `params` is not shaped like this model's, and where other processes hold a part of them.
        """
        if self._lead is not None:
            raise ValueError("weights that several processes hold can not be swapped; start again with the new ones")
        placed = self.loaded.place(params)
        self._in_flight = [None] * self.plan.num_lanes
        self.scheduler.reset_cache()
        self.loaded.params = placed
        self.runner.set_params(self.loaded.serving_form()[1])

    def _commit(self, lane: int, pending: PendingStep) -> tuple[list[RequestOutput], float]:
        """Read a step and hand out its tokens. Returns the outputs and the seconds spent waiting for the device."""
        waiting_since = time.monotonic()
        results = pending.read()
        now = time.monotonic()
        touched: dict[str, RequestState] = {}
        for shard, (schedule, result) in enumerate(zip(pending.schedules, results, strict=True)):
            self._commit_shard(lane, shard, schedule, result, now, touched)
        return [state.output for state in touched.values()], now - waiting_since

    def _commit_shard(
        self,
        lane: int,
        shard: int,
        schedule: Schedule,
        result: StepResult,
        now: float,
        touched: dict[str, RequestState],
    ) -> None:
        for sequence, first, token_ids, logprobs in result.prompt_logprobs:
            state = self._state_of(sequence)
            if state is not None:
                state.add_prompt_logprobs(first, token_ids, logprobs)
        for sequence in result.invalid:
            state = self._state_of(sequence)
            if state is not None:
                del self._requests[sequence.request_id]
                self.scheduler.abort(sequence.request_id)
                state.finish(now, self.metrics, "the model's logits are not finite; check the weights and the dtype")
                touched[sequence.request_id] = state
        for update in self.scheduler.commit(shard, schedule, result.token_ids, lane):
            sequence = update.sequence
            state = self._requests[sequence.request_id]
            touched[sequence.request_id] = state
            sample, reason, stop = sequence.sample_index, update.finish_reason, sequence.stop_reason
            found = state.add_token(sample, update.token_id, result.logprobs, update.sample, now, self.metrics, reason)
            if found is not None:
                if reason is None:
                    self.scheduler.finish(sequence, "stop", found)
                reason, stop = "stop", found
            if reason is not None:
                state.finish_sample(sample, reason, stop)
                if not state.num_open:
                    state.finish(now, self.metrics)
                    del self._requests[sequence.request_id]

    def _state_of(self, sequence: Sequence) -> RequestState | None:
        """None once its request has ended, even if another has taken the request's id."""
        state = self._requests.get(sequence.request_id)
        return state if state is not None and sequence in state.sequences else None

    def _start_over(self, error: str) -> None:
        """Wherever a step stopped, the books, the device and the outputs may disagree: none of them is kept."""
        now = time.monotonic()
        requests = self._requests
        self._open_books()
        for state in requests.values():
            state.finish(now, self.metrics, error)
        self._set_gauges()
        self.runner.reset()

    def _note_first_scheduled(self, schedules: Iterable[Schedule]) -> None:
        for row in chain.from_iterable(schedule.rows for schedule in schedules):
            if row.is_new and row.sequence.sample_index == 0:
                times = self._requests[row.sequence.request_id].output.metrics
                if times.first_scheduled_time is not None:
                    continue
                times.first_scheduled_time = row.sequence.first_scheduled_time
                queried = 0 if row.sequence.compute_all_prompt else row.sequence.num_prompt_tokens
                if not self.plan.enable_prefix_caching:
                    queried = 0
                self.metrics.request_scheduled(times.queue_time or 0.0, queried, row.sequence.num_cached_tokens)

    def _set_gauges(self) -> None:
        stats = self.scheduler.stats()
        self.metrics.set_gauges(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv.num_held / max(stats.kv.num_pages, 1),
        )

    @cached_property
    def _has_tokenizer(self) -> bool:
        return Tokenizer.exists(self.loaded.directory)

    def _detokenizer(self, request: Request) -> IncrementalDetokenizer | None:
        params = request.sampling_params
        if not self._has_tokenizer:
            if params.stop_strings:
                raise ValueError(f"stop={params.stop_strings} needs text, and {self.loaded.directory} has no tokenizer")
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            request.prompt_token_ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    def _decode_token(self, token_id: int) -> str | None:
        return self.tokenizer.decode([token_id], skip_special_tokens=False) if self._has_tokenizer else None


def _lead(config: EngineConfig, given: Mesh | None) -> Lead | None:
    """None for an engine of this process's own devices. given: a mesh that there is already."""
    if given is None:
        return lead(config) if jax.process_count() > 1 else None
    if spans_processes(given):
        raise ValueError(
            "the mesh has devices of other processes, which have to load the model too; give the model's path, and the "
            "mesh as text, such as 'tensor=2'"
        )
    return None


def make_request(
    engine: Engine,
    request_id: str,
    prompt: Any,
    sampling_params: Any,
    *,
    priority: int = 0,
    cache_salt: str = "",
) -> Request:
    """A Request from text or token ids, arriving now. ValueError for a prompt or parameters of another type."""
    if not isinstance(sampling_params, SamplingParams):
        raise ValueError(f"sampling_params={sampling_params!r} must be SamplingParams")
    text = prompt if isinstance(prompt, str) else None
    if text is not None:
        prompt = engine.tokenizer.encode(text)
    elif isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise ValueError(f"prompt={prompt!r} must be text or token ids")
    token_ids = tuple(prompt)
    for token_id in token_ids:
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            raise ValueError(f"prompt token id {token_id!r} must be a whole number")
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(map(int, token_ids)),
        sampling_params=sampling_params,
        prompt=text,
        priority=priority,
        arrival_time=time.monotonic(),
        cache_salt=cache_salt,
    )
