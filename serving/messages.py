"""Between protobuf messages and the server's own types. Imports no jax."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxinfer.openai.bodies import MAX_MESSAGES
from jaxinfer.types import Logprob, SamplingParams
from serving.conversation import Conversation, check_variables
from serving.deltas import Delta, End, Prompt, Reason, SequenceDelta
from serving.errors import RequestError
from serving.frontend import Ask
from serving.generated import inference_pb2 as pb
from serving.generated import models_pb2

# Fields of the messages that are SamplingParams' under the same name.
_SAMPLING = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
MAX_REQUEST_ID = 256
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos")
_OUTPUT = ("logprobs", "prompt_logprobs", "skip_special_tokens")

_REASONS: Mapping[Reason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORTED,
    "time_limit": pb.FINISH_REASON_TIME_LIMIT,
    "error": pb.FINISH_REASON_ERROR,
}


def read_ask(request: pb.GenerateRequest) -> Ask:
    """What a request asks for. RequestError, naming the field, for what is wrong in itself."""
    arrival_time = time.monotonic()
    if len(request.request_id) > MAX_REQUEST_ID:
        raise _invalid(f"request_id has {len(request.request_id)} characters; use at most {MAX_REQUEST_ID}")
    for message in (request, request.sampling, request.stopping, request.output):
        refuse_unknown(message)
    prompt = _prompt(request)
    try:
        params = SamplingParams(**_sampling_fields(request, is_chat=isinstance(prompt, Conversation)))
    except ValueError as error:
        raise _invalid(str(error)) from error
    has_limit = request.HasField("queue_time_limit_ms")
    return Ask(
        prompt=prompt,
        sampling_params=params,
        arrival_time=arrival_time,
        model=request.model,
        priority=request.priority,
        queue_time_limit=request.queue_time_limit_ms / 1000 if has_limit else None,
        cache_salt=request.cache_salt,
        name=request.request_id,
    )


def refuse_unknown(message: Message) -> None:
    """A newer client's field would be dropped in silence, and the answer would not be what it asked for."""
    for unknown in UnknownFieldSet(message):
        raise _invalid(f"field number {unknown.field_number} of {message.DESCRIPTOR.name} is not known to this server")


def read_tokenize(request: models_pb2.TokenizeRequest) -> str | Conversation:
    """The text or conversation. RequestError for a request without one, or with what does not go with it."""
    refuse_unknown(request)
    kind = request.WhichOneof("input")
    if kind is None:
        raise _invalid("the input is missing; set text or chat")
    if kind == "chat" and request.HasField("add_special_tokens"):
        raise _invalid("add_special_tokens goes with text; a chat template adds its own")
    return read_chat(request.chat) if kind == "chat" else request.text


def read_chat(chat: pb.Chat) -> Conversation:
    """RequestError for a message without a role and for arguments that are not variables of the template."""
    refuse_unknown(chat)
    if not chat.messages:
        raise _invalid("chat.messages is empty; give at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        raise _invalid(f"chat.messages has {len(chat.messages)} entries; use at most {MAX_MESSAGES}")
    messages = []
    for index, message in enumerate(chat.messages):
        refuse_unknown(message)
        if not message.role:
            raise _invalid(f"chat.messages[{index}].role is missing; write user, say")
        own = {"role": message.role, "content": message.content}
        messages.append({**own, "name": message.name} if message.HasField("name") else own)
    arguments = MessageToDict(chat.template_arguments)
    try:
        check_variables("chat.template_arguments", arguments)
    except ValueError as error:
        raise _invalid(str(error)) from error
    arguments |= _given(chat, ("add_generation_prompt", "continue_final_message"))
    return Conversation(tuple(messages), arguments)


def sendable(text: str) -> str:
    """A tokenizer may give half of a surrogate pair, which no protobuf text holds: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Writer:
    """Makes one request's responses."""

    request_id: str
    model: str
    options: pb.OutputOptions

    def response(self, delta: Delta, seq: int) -> pb.GenerateResponse:
        """The message for an addition; `seq` is its number in the request's answer."""
        response = pb.GenerateResponse(request_id=self.request_id, seq=seq)
        if delta.prompt is not None:
            response.prompt.CopyFrom(self._prompt_info(delta.prompt))
        response.sequences.extend(self._sequence(delta.sequences[index]) for index in sorted(delta.sequences))
        if delta.end is not None:
            response.usage.CopyFrom(_usage(delta.end))
            response.timings.CopyFrom(_timings(delta.end))
        return response

    def _prompt_info(self, prompt: Prompt) -> pb.PromptInfo:
        info = pb.PromptInfo(model=self.model, num_tokens=len(prompt.token_ids))
        if self.options.prompt_token_ids:
            info.token_ids.extend(prompt.token_ids)
        if prompt.logprobs is not None:
            scored = zip(prompt.token_ids, prompt.logprobs, strict=False)
            top = self.options.prompt_logprobs
            info.logprobs.extend(_token_logprob(token_id, entry, top) for token_id, entry in scored)
        return info

    def _sequence(self, sequence: SequenceDelta) -> pb.SequenceDelta:
        options = self.options
        message = pb.SequenceDelta(index=sequence.index)
        if options.text or not options.HasField("text"):
            message.text = sendable(sequence.text)
        if options.token_ids or not options.HasField("token_ids"):
            message.token_ids.extend(sequence.token_ids)
        if sequence.logprobs is not None:
            scored = zip(sequence.token_ids, sequence.logprobs, strict=True)
            message.logprobs.extend(_token_logprob(token_id, entry, options.logprobs) for token_id, entry in scored)
        if sequence.finish_reason is not None:
            message.finish.CopyFrom(self._finish(sequence, sequence.finish_reason))
        return message

    def _finish(self, sequence: SequenceDelta, reason: Reason) -> pb.Finish:
        finish = pb.Finish(reason=_REASONS[reason], completion_tokens=sequence.num_tokens)
        if sequence.cumulative_logprob is not None:
            finish.cumulative_logprob = sequence.cumulative_logprob
        if isinstance(sequence.stop_reason, str):
            finish.stop_string = sequence.stop_reason
        elif sequence.stop_reason is not None:
            finish.stop_token_id = sequence.stop_reason
        elif reason == "stop" and sequence.last_token_id is not None:
            finish.end_token_id = sequence.last_token_id
        return finish


def _prompt(request: pb.GenerateRequest) -> str | tuple[int, ...] | Conversation:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        if not request.text:
            raise _invalid("text is empty; give at least one character")
        return request.text
    if kind == "token_ids":
        if not request.token_ids.ids:
            raise _invalid("token_ids is empty; give at least one token")
        return tuple(request.token_ids.ids)
    if kind == "chat":
        return read_chat(request.chat)
    raise _invalid("the prompt is missing; set text, token_ids or chat")


def _sampling_fields(request: pb.GenerateRequest, is_chat: bool) -> dict[str, Any]:
    sampling, stopping, output = request.sampling, request.stopping, request.output
    fields: dict[str, Any] = {"max_tokens": None} if is_chat else {}
    fields |= _given(sampling, _SAMPLING) | _given(stopping, _STOPPING) | _given(output, _OUTPUT)
    for name, message in (
        ("allowed_token_ids", sampling),
        ("banned_token_ids", sampling),
        ("stop_token_ids", stopping),
        ("stop", stopping),
    ):
        if values := getattr(message, name):
            fields[name] = tuple(values)
    if sampling.logit_bias:
        fields["logit_bias"] = dict(sampling.logit_bias)
    if stopping.HasField("include_stop"):
        fields["include_stop_str_in_output"] = stopping.include_stop
    return fields


def _given(message: Message, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _token_logprob(token_id: int, entry: Mapping[int, Logprob] | None, num_top: int) -> pb.TokenLogprob:
    """The entry of one position: the token itself comes first in it, then the best by rank that are not the token."""
    message = pb.TokenLogprob(token_id=token_id)
    if entry is None:
        return message
    own = entry[token_id]
    message.logprob = own.logprob
    if own.rank is not None:
        message.rank = own.rank
    if own.decoded_token is not None:
        message.text = sendable(own.decoded_token)
    best = sorted((scored.rank, other) for other, scored in entry.items() if scored.rank is not None)
    for _, other in best[:num_top]:
        text = entry[other].decoded_token
        message.top.add(token_id=other, logprob=entry[other].logprob, text=None if text is None else sendable(text))
    return message


def _usage(end: End) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=end.num_prompt_tokens,
        completion_tokens=end.num_completion_tokens,
        cached_prompt_tokens=end.num_cached_tokens,
    )


def _timings(end: End) -> pb.Timings:
    return pb.Timings(
        queue=end.queue_time,
        time_to_first_token=end.time_to_first_token,
        decode=end.decode_time,
        total=end.total_time,
        num_preemptions=end.num_preemptions,
    )


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)
