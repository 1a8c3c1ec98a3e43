"""A step that is sent, and what is read of it later: here, or by another process that tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.outputs import ScoredTokens
from jaxinfer.runner.step_plan import ScoredPart, StepPlan
from jaxinfer.sampling.logprobs import TokenLogprobs
from jaxinfer.sampling.sampler import SampleOutput
from jaxinfer.scheduler.schedule import Schedule
from jaxinfer.scheduler.sequence import Sequence


@dataclass(frozen=True)
class StepResult:
    """What a step computed for one shard, on the host. Rows are those of its schedule's `sampling_rows`.

    token_ids int32 [R]. logprobs: None unless a row asked. invalid: sequences whose logits were not finite.
    prompt_logprobs: for each sequence that asked, the first prompt position scored by this step, the tokens from there
    on, and their scores.
    """

    token_ids: np.ndarray
    logprobs: ScoredTokens | None
    invalid: tuple[Sequence, ...]
    prompt_logprobs: tuple[tuple[Sequence, int, list[int], ScoredTokens], ...]


@dataclass(frozen=True)
class SentStep:
    """What the devices will have of a step. sampled: None where no row samples. scores: in the step plan's order.

    hidden: what this process's devices compute last of the model. Without the last stage it has but that.
    """

    hidden: jax.Array
    sampled: SampleOutput | None
    scores: tuple[TokenLogprobs, ...]

    def arrived(self) -> SentStep:
        return self

    def arrays(self) -> list[np.ndarray]:
        """All that can be read of it, in an order that AwaitedStep knows; waits for them."""
        return jax.device_get(jax.tree.leaves((self.sampled, self.scores)))


_ARRAY: Any = 0
_SCORES = TokenLogprobs(_ARRAY, _ARRAY, _ARRAY, _ARRAY)
_SAMPLED = SampleOutput(_ARRAY, _ARRAY, _SCORES)


@dataclass
class AwaitedStep:
    """A step whose results another process reads, and tells. own: what this process sent of it."""

    own: SentStep
    plan: StepPlan
    answer: Callable[[], list[np.ndarray]]
    _arrived: SentStep | None = None

    def arrived(self) -> SentStep:
        """The step with its results; waits for them."""
        if self._arrived is None:
            self.own.hidden.block_until_ready()  # where that fails, nobody answers
            structure = jax.tree.structure(
                (None if self.plan.samples is None else _SAMPLED, (_SCORES,) * len(self.plan.scores))
            )
            sampled, scores = jax.tree.unflatten(structure, self.answer())
            self._arrived = SentStep(self.own.hidden, sampled, scores)
        return self._arrived


@dataclass(frozen=True)
class PendingStep:
    """A step of one lane on its way through the devices, with a schedule for every shard.

    waited: seconds for which sending it waited for what it depends on.
    """

    schedules: tuple[Schedule, ...]
    scored: tuple[ScoredPart, ...]
    sent: SentStep | AwaitedStep
    waited: float

    def token_ids(self) -> np.ndarray:
        """What rows have drawn, int32 [shards, rows], of a step that samples; waits for it."""
        sampled = self.sent.arrived().sampled
        assert sampled is not None
        return np.asarray(sampled.token_ids)

    def read(self) -> list[StepResult]:
        """Wait for the step and fetch what was asked for, shard by shard."""
        sent = self.sent.arrived()
        if sent.sampled is None:
            sent.hidden.block_until_ready()
            token_ids = invalid = np.zeros((len(self.schedules), 0), np.int32)
        else:
            token_ids, invalid = np.asarray(sent.sampled.token_ids), np.asarray(sent.sampled.invalid)
        return [
            self._result(sent, shard, schedule, token_ids[shard], invalid[shard])
            for shard, schedule in enumerate(self.schedules)
        ]

    def _result(
        self, sent: SentStep, shard: int, schedule: Schedule, token_ids: np.ndarray, invalid: np.ndarray
    ) -> StepResult:
        rows, sampled = schedule.sampling_rows, sent.sampled
        logprobs = None
        if sampled is not None and any(row.sequence.params.logprobs is not None for row in rows):
            logprobs = _fetch(sampled.logprobs, shard, len(rows))
        return StepResult(
            token_ids=token_ids[: len(rows)],
            logprobs=logprobs,
            invalid=tuple(row.sequence for row, bad in zip(rows, invalid[: len(rows)], strict=True) if bad),
            prompt_logprobs=tuple(
                (part.sequence, part.first, part.token_ids, _fetch(scores, shard, len(part.token_ids)))
                for part, scores in zip(self.scored, sent.scores, strict=True)
                if part.shard == shard
            ),
        )


def _fetch(scores: TokenLogprobs, shard: int, count: int) -> ScoredTokens:
    parts = scores.logprob, scores.rank, scores.top_token_ids, scores.top_logprobs
    return ScoredTokens(*(np.asarray(part)[shard, :count] for part in parts))
