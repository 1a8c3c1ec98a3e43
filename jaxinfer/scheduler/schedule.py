"""What one step runs: the scheduler's output and the runner's input. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.cache.manager import KVUsage, PageCopy
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.types import FinishReason


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step.

    max_num_seqs            sequences that run at the same time: rows of a step, slots of the device's state
    max_num_batched_tokens  tokens of one step, decodes and prefill chunks together
    max_model_len           tokens of one sequence, prompt and outputs
    max_chunk_tokens        tokens of one sequence in one step; None: max_num_batched_tokens. A smaller chunk makes the
                            rings of sliding-window layers smaller and lets several prompts share a step
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is out of range; use at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} cannot hold one token of each of "
                f"max_num_seqs={self.max_num_seqs} sequences; raise the first or lower the second"
            )

    @property
    def chunk_tokens(self) -> int:
        return min(self.max_chunk_tokens or self.max_num_batched_tokens, self.max_num_batched_tokens)


class ScheduledRow(NamedTuple):
    """One sequence's part of a step: it computes positions [start, start + num_tokens).

    samples     the step samples the sequence's next token and leaves it in the device's last-token array at `slot`
    input_slot  slot whose last sampled token is the row's only input token, not known to the host yet; -1: known
    hidden_row  row whose last hidden state the token is sampled from: its own, or sample 0's for a forked sample,
                which computes nothing (num_tokens 0) in the step that completes the prompt
    is_new      the sequence's first row since it got the slot: state kept per slot must be set up from `sequence`
    """

    sequence: Sequence
    slot: int
    start: int
    num_tokens: int
    samples: bool
    input_slot: int
    hidden_row: int
    is_new: bool


@dataclass(frozen=True, eq=False)
class Schedule:
    """One step. It must be packed before the scheduler's next call (which may move pages), and must then be run.

    rows               one-token rows first, then longer chunks, then forked samples (no tokens); no slot twice
    sampling_rows      those of them that sample, in the same order: one sampled token each
    copies             pages to copy before anything is written; no page is both a target and a later source
    num_decode_tokens  tokens of rows that add one to an output; num_prefill_tokens: all others, recomputed ones too
    num_single_rows    how many rows have exactly one token
    preempted          sequences that lost their pages to this step
    """

    rows: tuple[ScheduledRow, ...]
    sampling_rows: tuple[ScheduledRow, ...]
    copies: tuple[PageCopy, ...]
    num_decode_tokens: int
    num_prefill_tokens: int
    num_single_rows: int
    preempted: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens


class SequenceUpdate(NamedTuple):
    """A token that became known at a commit; `sample` is its index in the step's sampling rows and outputs."""

    sequence: Sequence
    sample: int
    token_id: int
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class SchedulerStats:
    """Queue lengths and counts since the start. Prefix numbers are of first admissions, in tokens."""

    num_running: int
    num_waiting: int
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    kv: KVUsage
