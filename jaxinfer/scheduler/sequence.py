"""One completion being generated: the host's mutable record of it. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from jaxinfer.cache.manager import SequencePages
from jaxinfer.types import FinishReason, SamplingParams


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `params.n` samples. The first group of fields is the caller's, the rest the scheduler's.

    token_ids           prompt and the outputs that the host knows
    seed                of its random numbers, for the sampler; samples of one request share it
    eos_token_ids       end it, unless params.ignore_eos
    compute_all_prompt  every prompt position must pass through the model (prompt logprobs): no prefix hits
    num_total_tokens    tokens known and in flight
    num_computed_tokens positions whose keys and values are written once the last scheduled step has run
    num_in_flight       tokens sampled by scheduled steps that are not committed yet
    max_total_tokens    prompt and outputs at most: max_tokens, max_model_len and the pool, whichever is least
    slot                row of its page tables and of the device's last-token array while it runs, else -1
    num_cached_tokens   prompt tokens that the prefix cache (or, for a forked sample, sample 0) spared it
    first_scheduled_time seconds, as given to `Scheduler.schedule`
    followers           samples 1.. of the request, held back until this sample 0 has computed the prompt
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    sample_index: int = 0
    seed: int = 0
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str = ""
    compute_all_prompt: bool = False

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_prompt_tokens: int = field(init=False)
    num_total_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    max_total_tokens: int = 0
    slot: int = -1
    pages: SequencePages | None = None
    page_hashes: list[bytes] = field(default_factory=list)
    order: tuple[int, float, int] = (0, 0.0, 0)  # (priority, arrival, number): who goes first
    stop_ids: frozenset[int] = field(init=False)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    followers: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_total_tokens = len(self.token_ids)
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.stop_ids = eos.union(self.params.stop_token_ids or ())

    @property
    def num_output_tokens(self) -> int:
        """Outputs that the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def end_reason(self) -> tuple[FinishReason, int | None] | None:
        """Whether the newest known token ends it: (reason, stop token). The stop token is None for end of sequence."""
        token_id = self.token_ids[-1]
        if token_id in self.stop_ids and self.num_output_tokens >= self.params.min_tokens:
            is_eos = token_id in self.eos_token_ids and not self.params.ignore_eos
            return "stop", None if is_eos else token_id
        if len(self.token_ids) >= self.max_total_tokens:
            return "length", None
        return None
