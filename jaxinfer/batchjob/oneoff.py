"""One prompt, its completion streamed to the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from jaxinfer.batchjob.lines import JobError
from jaxinfer.batchjob.requests import line_seed
from jaxinfer.metrics import format_seconds
from jaxinfer.types import Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

MAX_TOKENS = 256


def run_prompt(engine: Engine, prompt: str, *, chat: bool, sampling: Mapping[str, Any], seed: int, out: TextIO) -> str:
    """Write the completion to `out` as it comes and end it with a newline; returns a line on how fast it was.

    JobError where the engine refuses the prompt or fails on it.
    """
    params = SamplingParams(**{"max_tokens": MAX_TOKENS, "seed": line_seed(seed, 1), **sampling})
    try:
        tokenizer = engine.tokenizer
        token_ids = (
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else tokenizer.encode(prompt)
        )
        engine.add_request(Request("prompt", tuple(token_ids), params, prompt, arrival_time=time.monotonic()))
    except ValueError as error:
        raise JobError(str(error)) from error
    written = 0
    while engine.has_unfinished():
        for output in engine.step():
            text = output.outputs[0].text if output.outputs else ""
            out.write(text[written:])
            out.flush()
            written = max(written, len(text))
            if output.finished:
                out.write("\n")
                out.flush()
                if output.error is not None:
                    raise JobError(output.error)
                return _summary(output)
    raise RuntimeError("the engine lost the request")


def _summary(output: RequestOutput) -> str:
    completion, metrics = output.outputs[0], output.metrics
    text = f"{len(output.prompt_token_ids)} prompt tokens, {len(completion.token_ids)} output tokens"
    text += f" ({completion.finish_reason})"
    if metrics.time_to_first_token is not None:
        text += f", first after {format_seconds(metrics.time_to_first_token)}"
    gaps = metrics.inter_token_latencies
    if gaps:
        text += f", then {len(gaps) / max(sum(gaps), 1e-9):,.1f} tokens per second"
    return text
