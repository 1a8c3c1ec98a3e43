"""What a server allows, frozen. Imports no jax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
# More text than this for each token of max_model_len is refused without tokenizing it.
MAX_PROMPT_BYTES_PER_TOKEN = 32
SPARE_CONNECTIONS = 256
GRPC_CONNECTIONS = 1024


@dataclass(frozen=True)
class Limits:
    """Limits that keep one client from hurting the others. Times in seconds.

    max_queued_requests  requests beyond those that can run at once; None is four times as many
    max_queued_tokens    prompt tokens that wait to be computed; None is 64 steps full of them, and at least
                         eight prompts of the greatest length
    max_n                completions of one request; None is max_num_seqs
    max_items_in_flight  requests of one GenerateMany call that are worked on at a time
    max_unread_tokens    tokens of one stream that its reader has not taken
    stall_seconds        how long a reader may leave a message unread
    max_message_bytes    size of one message from a client
    max_connections      HTTP connections open at a time, as many gRPC connections, and as many gRPC calls; None is 256
                         more than the requests that may run or wait, and 1024 gRPC connections, whose number is
                         settled before the model's is known
    stream_pause         longest time for which a stream's text is collected into one message, with many streams running
    step_timeout         how long a step of the warm engine may take before it is taken to hang
    """

    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_n: int | None = None
    max_items_in_flight: int = 256
    max_unread_tokens: int = 16384
    stall_seconds: float = 30.0
    max_message_bytes: int = 16 * 2**20
    max_connections: int | None = None
    stream_pause: float = 0.15
    step_timeout: float = 120.0

    def __post_init__(self) -> None:
        """ValueError naming the flag, the value and the limit."""
        for name, low in (
            ("max_queued_requests", 0),
            ("max_queued_tokens", 1),
            ("max_n", 1),
            ("max_items_in_flight", 1),
            ("max_unread_tokens", 1),
            ("max_message_bytes", 1024),
            ("max_connections", 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= 2**31 - 1:
                raise ValueError(f"{name}={value} is out of range; use a value in [{low}, {2**31 - 1}]")
        for name in ("stall_seconds", "step_timeout"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name}={seconds} must be a number above 0")
        if not 0 <= self.stream_pause <= 1:
            raise ValueError(f"stream_pause={self.stream_pause} is out of range; use a value in [0, 1]")


@dataclass(frozen=True)
class ModelFacts:
    """What the front ends know of the engine's model. num_slots: sequences that can run at the same time on all shards
    of its mesh; max_num_seqs, max_num_batched_tokens and num_pages are those of one shard."""

    name: str
    max_model_len: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    dtype: str
    page_size: int
    num_pages: int
    eos_token_ids: tuple[int, ...]


def package_version() -> str:
    """jaxinfer's, or where it runs from its sources without being installed, so much."""
    try:
        return version("jaxinfer")
    except PackageNotFoundError:
        return "not installed"
