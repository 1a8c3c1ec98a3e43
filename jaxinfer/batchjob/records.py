"""What is written for a line: our own record for a plain one, OpenAI's batch output format for theirs.

Each record carries its line's number and digest, so that a job can be resumed from its results alone: plain ones as
`line` and `digest`, OpenAI's in `id`, as batch_req_<line>_<digest>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.batchjob.requests import Failure, Work
from jaxinfer.openai.answers import chat_logprobs, completion_logprobs, finite, token_text, usage
from jaxinfer.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput

_RECORD_ID = re.compile(r"batch_req_(\d+)_([0-9a-f]+)")


def encode(record: Mapping[str, Any]) -> bytes:
    """One line of JSON with its newline, in readable UTF-8 unless a string has half a surrogate pair."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(record, allow_nan=False).encode("ascii")
    return text + b"\n"


def identity(record: Any) -> tuple[int, str, bool] | None:
    """(line number, digest, whether the line failed) of a record this module made; None for anything else."""
    if not isinstance(record, dict):
        return None
    if "custom_id" in record:
        match = _RECORD_ID.fullmatch(str(record.get("id")))
        response = record.get("response")
        if match is None or not isinstance(response, dict):
            return None
        return int(match[1]), match[2], response.get("status_code") != 200
    number, digest = record.get("line"), record.get("digest")
    if isinstance(number, int) and isinstance(digest, str):
        return number, digest, "error" in record
    return None


def failure_record(failure: Failure) -> dict[str, Any]:
    message = f"line {failure.line.number}: {failure.message}"
    kind = "invalid_request_error" if failure.status_code < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    if failure.is_openai:
        return _batch_response(failure, failure.status_code, {"error": error})
    return {**_plain_head(failure), "error": {"message": message, "type": kind}}


def result_record(work: Work, outputs: Sequence[RequestOutput], *, model: str, created: int) -> dict[str, Any]:
    """The finished line. `outputs`: one for each prompt of the line. `created`: Unix time in seconds."""
    if work.kind == "plain":
        return _plain(work, outputs[0])
    completions = [completion for output in outputs for completion in output.outputs]
    if work.kind == "chat":
        num_top = work.sampling_params.logprobs or 0
        choices = [_chat_choice(index, part, num_top) for index, part in enumerate(completions)]
    else:
        choices = [_completion_choice(index, part) for index, part in enumerate(completions)]
    body = {
        "id": f"{'chatcmpl' if work.kind == 'chat' else 'cmpl'}-{work.line.number}-{work.line.digest}",
        "object": "chat.completion" if work.kind == "chat" else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": _usage(outputs),
    }
    return _batch_response(work, 200, body)


def _plain_head(item: Work | Failure) -> dict[str, Any]:
    head = {"line": item.line.number, "digest": item.line.digest}
    return {**head, "id": item.user_id} if item.has_id else head


def _plain(work: Work, output: RequestOutput) -> dict[str, Any]:
    prompt = work.prompts[0]
    record = {
        **_plain_head(work),
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "outputs": [_plain_output(completion) for completion in output.outputs],
        "usage": _usage([output]),
        "metrics": _plain_metrics(output.metrics),
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if at is None else _entries(at) for at in output.prompt_logprobs]
    return record


def _plain_output(completion: CompletionOutput) -> dict[str, Any]:
    result = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        result["logprobs"] = [_entries(at) for at in completion.logprobs]
    return result


def _plain_metrics(metrics: RequestMetrics) -> dict[str, Any]:
    latencies = metrics.inter_token_latencies
    return {
        "queue_time": metrics.queue_time,
        "time_to_first_token": metrics.time_to_first_token,
        "mean_inter_token_latency": sum(latencies) / len(latencies) if latencies else None,
        "end_to_end_time": metrics.end_to_end_time,
        "num_preemptions": metrics.num_preemptions,
    }


def _entries(at: Mapping[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "token": token_text(token_id, entry), "logprob": finite(entry), "rank": entry.rank}
        for token_id, entry in at.items()
    ]


def _batch_response(item: Work | Failure, status_code: int, body: dict[str, Any]) -> dict[str, Any]:
    name = f"{item.line.number}_{item.line.digest}"
    return {
        "id": f"batch_req_{name}",
        "custom_id": item.user_id,
        "response": {"status_code": status_code, "request_id": f"req_{name}", "body": body},
        "error": None,
    }


def _completion_choice(index: int, completion: CompletionOutput) -> dict[str, Any]:
    return {
        "index": index,
        "text": completion.text,
        "logprobs": completion_logprobs(completion.token_ids, completion.logprobs),
        "finish_reason": completion.finish_reason,
    }


def _chat_choice(index: int, completion: CompletionOutput, num_top: int) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": chat_logprobs(completion.token_ids, completion.logprobs, num_top),
        "finish_reason": completion.finish_reason,
    }


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    return usage(
        num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        num_completion_tokens=sum(len(part.token_ids) for output in outputs for part in output.outputs),
        num_cached_tokens=sum(output.metrics.num_cached_tokens for output in outputs),
    )
