"""An engine with the real one's face, whose tokens depend on the prompt and the seed alone, for tests of the job.

Run as a program it is `python -m jaxinfer.run` over this engine; FAKE_STEP_SECONDS makes its steps last.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.metrics import EngineMetrics, EngineStats
from jaxinfer.types import CompletionOutput, Logprob, Request, RequestOutput

MAX_MODEL_LEN = 200


class ByteTokenizer:
    """Token ids are UTF-8 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        if any(message["role"] == "broken" for message in messages):
            raise ValueError("the chat template refuses the role 'broken'")
        marker = "!" if arguments.get("loud") else ""
        return self.encode("".join(f"<{m['role']}>{m['content']}{marker}" for m in messages) + "<assistant>")


class FakeEngine:
    """One token a step for every running completion; at most `max_num_seqs` requests run."""

    def __init__(
        self, config: EngineConfig, step_seconds: float = 0.0, fails: str = "", has_tokenizer: bool = True
    ) -> None:
        """fails: requests whose prompt has this text end in an error."""
        self._has_tokenizer = has_tokenizer
        self.plan = SimpleNamespace(num_slots=config.max_num_seqs or 4)
        self.requests: dict[str, tuple[Request, RequestOutput, list[list[int]]]] = {}
        self.most_in_flight = 0
        self._metrics = EngineMetrics(kv_cache_bytes=1 << 20)
        self._step_seconds = step_seconds
        self._fails = fails

    @property
    def tokenizer(self) -> ByteTokenizer:
        if not self._has_tokenizer:
            raise ValueError("no tokenizer; give token ids instead of text")
        return ByteTokenizer()

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        if len(request.prompt_token_ids) >= MAX_MODEL_LEN:
            raise ValueError(
                f"prompt of {len(request.prompt_token_ids)} tokens; the limit is {MAX_MODEL_LEN}; shorten it"
            )
        rng = random.Random(f"{request.prompt_token_ids}/{params.seed}")
        room = MAX_MODEL_LEN - len(request.prompt_token_ids)
        limit = min(params.max_tokens or room, room)
        futures = [[rng.randrange(97, 123) for _ in range(limit)] for _ in range(params.n)]
        output = RequestOutput(
            request.request_id,
            request.prompt,
            list(request.prompt_token_ids),
            [CompletionOutput(index, logprobs=None if params.logprobs is None else []) for index in range(params.n)],
        )
        output.metrics.arrival_time = request.arrival_time
        self.requests[request.request_id] = (request, output, futures)
        self.most_in_flight = max(self.most_in_flight, len(self.requests))
        self._metrics.request_added(len(request.prompt_token_ids))

    def abort(self, request_id: str) -> RequestOutput | None:
        found = self.requests.pop(request_id, None)
        return None if found is None else found[1]

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def stats(self) -> EngineStats:
        return self._metrics.snapshot()

    def step(self) -> list[RequestOutput]:
        time.sleep(self._step_seconds)
        return [self._advance(name) for name in list(self.requests)[: self.plan.num_slots]]

    def _advance(self, name: str) -> RequestOutput:
        request, output, futures = self.requests[name]
        now = time.monotonic()
        if output.metrics.first_token_time is None:
            output.metrics.first_scheduled_time = output.metrics.first_token_time = now
        output.metrics.token_times.append(now)
        for completion, future in zip(output.outputs, futures, strict=True):
            token_id = future[len(completion.token_ids)]
            completion.token_ids.append(token_id)
            completion.text += chr(token_id)
            if completion.logprobs is not None:
                num_top = request.sampling_params.logprobs or 0
                others = {i: Logprob(-float(i) - 0.5, i + 1, chr(i) if i else None) for i in range(num_top)}
                completion.logprobs.append({token_id: Logprob(float("-inf"), 400, chr(token_id)), **others})
            if len(completion.token_ids) == len(future):
                completion.finish_reason = "length"
        self._metrics.tokens_given(len(futures))
        if self._fails and request.prompt is not None and self._fails in request.prompt:
            output.error = "the model's logits are not finite"
            output.outputs[0].finish_reason = "error"
        if output.outputs[0].finish_reason is not None:
            output.finished = True
            output.metrics.finished_time = now
            del self.requests[name]
            self._metrics.request_finished(output.outputs[0].finish_reason)
        return output


def main(argv: Sequence[str] | None = None) -> int:
    from jaxinfer.run import main as run

    seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
    return run(argv, open_engine=lambda config: FakeEngine(config, seconds))


if __name__ == "__main__":
    sys.exit(main())
