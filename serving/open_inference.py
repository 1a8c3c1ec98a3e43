"""The Open Inference Protocol (KServe V2) with Triton's streaming, over the same front end. Imports no jax.

Tensors are those of Triton's vLLM backend. Inputs, all of shape [1]: `text_input`, `stream`, `sampling_parameters`
(JSON), `exclude_input_in_output`, and `return_*` for more outputs. Outputs: `text_output` and what was asked for, one
element for each of the n completions. As there, an answer in one piece begins with the prompt, unless
exclude_input_in_output says otherwise. Sampling parameters may also be parameters of the request. Whatever is not
honoured is refused.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from jaxinfer.openai.objects import BodyError, parse_object
from jaxinfer.types import Logprob, SamplingParams
from serving.calls import DEFECT, Context, Service, answered
from serving.deltas import SequenceDelta
from serving.errors import RequestError
from serving.frontend import Ask
from serving.generated import open_inference_pb2 as pb
from serving.generated import open_inference_pb2_grpc
from serving.messages import MAX_REQUEST_ID, refuse_unknown, sendable
from serving.settings import package_version

log = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
_VERSION = "1"  # models here have one version; clients may leave it out

_INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
_OUTPUTS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
# Clients of that backend send numbers as text, too.
_WHOLE = {"n", "top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs"}
_TRUTHS = {"include_stop_str_in_output", "ignore_eos", "skip_special_tokens"}
_TEXTS = {"stop", "stop_token_ids", "allowed_token_ids", "banned_token_ids", "logit_bias"}
_SAMPLING = frozenset(SamplingParams.__dataclass_fields__) - {"prompt_logprobs"}  # which no output would carry


@dataclass(frozen=True)
class _Question:
    """A request as it was understood. prefix: what text_output begins with. outputs: names, in the order asked for."""

    ask: Ask
    is_streamed: bool
    prefix: str
    outputs: tuple[str, ...]


class OpenInference(Service, open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """live, ready, metadata, infer, stream infer."""

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=not self.frontend.dead.is_set())

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.frontend.healthy)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        is_here = request.name == self.frontend.name and request.version in ("", _VERSION)
        return pb.ModelReadyResponse(ready=is_here and self.frontend.healthy)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="jaxinfer", version=package_version(), extensions=["parameters"])

    @answered
    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        self._check_model(request.name, request.version)

        def tensors(kinds: Mapping[str, str]) -> list[pb.ModelMetadataResponse.TensorMetadata]:
            shapes = {name: [1 if name in _INPUTS or name == "num_input_tokens" else -1] for name in kinds}
            return [
                pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=kind, shape=shapes[name])
                for name, kind in kinds.items()
            ]

        return pb.ModelMetadataResponse(
            name=self.frontend.name,
            versions=[_VERSION],
            platform="jaxinfer",
            inputs=tensors(_INPUTS),
            outputs=tensors(_OUTPUTS),
        )

    @answered
    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        with self.frontend.counting_refusals():
            question = await self._understood(request)
            if question.is_streamed:
                raise _invalid("stream is true, and ModelInfer has one answer; use ModelStreamInfer")
        async with aclosing(self._answers(request, question)) as answers:
            return await anext(answers)

    @answered
    async def ModelStreamInfer(self, requests: AsyncIterator[pb.ModelInferRequest], context: Context) -> None:
        await self.serve_items(context, self._stream_answers)

    async def _stream_answers(
        self, number: int, request: pb.ModelInferRequest
    ) -> AsyncGenerator[pb.ModelStreamInferResponse, None]:
        """One request's answers. What goes wrong with it is told in its last message, and the call goes on."""
        try:
            with self.frontend.counting_refusals():
                question = await self._understood(request)
            async with aclosing(self._answers(request, question)) as answers:
                async for answer in answers:
                    yield pb.ModelStreamInferResponse(infer_response=answer)
        except RequestError as error:
            yield _failure(request, error)
        except Exception:
            log.exception("request %d of a stream failed, id=%r", number, request.id)
            yield _failure(request, RequestError("INTERNAL", DEFECT))

    async def _answers(
        self, request: pb.ModelInferRequest, question: _Question
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The answers to one request, the last marked as such. RequestError where it is refused or not complete."""
        stream = await self.frontend.submit(question.ask, is_streamed=question.is_streamed)
        async with stream:
            latest: dict[int, SequenceDelta] = {}
            prefix = question.prefix
            while True:
                delta = await stream.next()
                while not question.is_streamed and delta.end is None:
                    delta.add(await stream.next())
                if delta.end is not None and delta.end.error is not None:
                    raise delta.end.error
                latest |= delta.sequences
                answer = pb.ModelInferResponse(model_name=self.frontend.name, model_version=_VERSION, id=request.id)
                for name in question.outputs:
                    if name == "num_input_tokens":
                        values = [len(stream.request.prompt_token_ids)]
                    else:
                        num_completions = question.ask.sampling_params.n
                        values = [
                            _value(name, delta.sequences.get(i), latest.get(i), prefix) for i in range(num_completions)
                        ]
                    _add_output(answer, name, values)
                answer.parameters["triton_final_response"].bool_param = delta.end is not None
                yield answer
                if delta.end is not None:
                    return
                prefix = ""

    def _check_model(self, name: str, model_version: str) -> None:
        self.frontend.check_model(name)
        if model_version not in ("", _VERSION):
            raise RequestError("NOT_FOUND", f"model_version={model_version!r} is not served; use {_VERSION!r} or none")

    async def _understood(self, request: pb.ModelInferRequest) -> _Question:
        """RequestError, naming the tensor or parameter, for what is wrong or not honoured."""
        arrival_time = time.monotonic()
        self._check_model(request.model_name, request.model_version)
        return await self.frontend.understand(request.ByteSize(), lambda: _read(request, arrival_time))


def _read(request: pb.ModelInferRequest, arrival_time: float) -> _Question:
    refuse_unknown(request)
    if len(request.id) > MAX_REQUEST_ID:
        raise _invalid(f"id has {len(request.id)} characters; use at most {MAX_REQUEST_ID}")
    inputs = _read_inputs(request)
    if "text_input" not in inputs:
        raise _invalid("text_input is missing; give a BYTES tensor of shape [1]")
    is_streamed = bool(inputs.get("stream", False))
    is_prefixed = not inputs.get("exclude_input_in_output", is_streamed)
    if is_prefixed and is_streamed:
        raise _invalid("exclude_input_in_output is false with stream true; leave it out, or stream false")
    parameters, timeout = _read_parameters(request)
    sampling = {**_read_json(inputs), **_no_twice(inputs, parameters)}
    try:
        sampling_params = SamplingParams(**{name: _number(name, value) for name, value in sampling.items()})
    except ValueError as error:
        raise _invalid(str(error)) from error
    for name in ("return_logprobs", "return_cumulative_logprob"):
        if inputs.get(name) and sampling_params.logprobs is None:
            raise _invalid(f"{name} is true, but the sampling parameter logprobs is unset; set it to 0 or more")
    ask = Ask(
        prompt=inputs["text_input"],
        sampling_params=sampling_params,
        arrival_time=arrival_time,
        model=request.model_name,
        queue_time_limit=timeout,
        name=request.id,
    )
    produced = [name for name in _OUTPUTS if name == "text_output" or inputs.get(f"return_{name}")]
    prefix = inputs["text_input"] if is_prefixed else ""
    return _Question(ask, is_streamed, prefix, _chosen_outputs(request, produced))


def _read_inputs(request: pb.ModelInferRequest) -> dict[str, Any]:
    """The value of each input: text of a BYTES tensor, truth of a BOOL tensor."""
    is_raw = bool(request.raw_input_contents)
    if is_raw and len(request.raw_input_contents) != len(request.inputs):
        raise _invalid(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs; "
            f"give one for each, or none"
        )
    values: dict[str, Any] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        refuse_unknown(tensor)
        if name not in _INPUTS:
            raise _invalid(f"input {name[:100]!r} is not honoured here; use {', '.join(_INPUTS)}")
        if name in values:
            raise _invalid(f"input {name!r} is there twice; give it once")
        if tensor.datatype != _INPUTS[name] or list(tensor.shape) != [1]:
            raise _invalid(
                f"input {name!r} is {tensor.datatype[:20]} of shape {list(tensor.shape)[:8]}; make it "
                f"{_INPUTS[name]} of shape [1]"
            )
        for parameter in tensor.parameters:
            raise _invalid(f"parameter {parameter[:100]!r} of input {name!r} is not honoured here; leave it out")
        if is_raw and tensor.HasField("contents"):
            raise _invalid(f"input {name!r} has both raw_input_contents and contents; give one of them")
        element = _raw_element(name, request.raw_input_contents[index]) if is_raw else _typed_element(tensor)
        values[name] = _text(name, element) if isinstance(element, bytes) else element
    return values


def _raw_element(name: str, raw: bytes) -> bytes | bool:
    """The only element of a tensor's bytes: a length of 4 bytes, little-endian, and so many; or one byte of truth."""
    if _INPUTS[name] == "BOOL":
        if raw not in (b"\0", b"\1"):
            raise _invalid(f"input {name!r} is BOOL and has {len(raw)} raw bytes; give one byte, 0 or 1")
        return raw == b"\1"
    if len(raw) < 4 or len(raw) - 4 != struct.unpack_from("<I", raw)[0]:
        raise _invalid(f"input {name!r} is BYTES, and its raw contents are not a length and so many bytes")
    return raw[4:]


def _typed_element(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes | bool:
    refuse_unknown(tensor.contents)
    kind = "bool_contents" if _INPUTS[tensor.name] == "BOOL" else "bytes_contents"
    given = [field.name for field, _ in tensor.contents.ListFields()]
    elements = getattr(tensor.contents, kind)
    if given != [kind] or len(elements) != 1:
        raise _invalid(f"input {tensor.name!r} must have one element in {kind}, or in raw_input_contents")
    return elements[0]


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"input {name!r} is no UTF-8: {error.reason} at byte {error.start}") from error


def _read_parameters(request: pb.ModelInferRequest) -> tuple[dict[str, Any], float | None]:
    """Sampling parameters among the request's own, and its time limit in seconds."""
    sampling, timeout = {}, None
    for name, parameter in request.parameters.items():
        refuse_unknown(parameter)
        kind = parameter.WhichOneof("parameter_choice")
        value = None if kind is None else getattr(parameter, kind)
        if name == "triton_enable_empty_final_response":
            if kind != "bool_param":
                raise _invalid(f"parameter {name} must be a bool_param")
            # Honoured either way: the last answer is marked, and none is empty for the mark's sake.
        elif name == "timeout":
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise _invalid("parameter timeout must be a number of microseconds, 0 or more")
            timeout = value / 1e6 if value else None
        elif name in _SAMPLING:
            sampling[name] = value
        else:
            raise _invalid(f"parameter {name[:100]!r} is not honoured here; leave it out")
    return sampling, timeout


def _read_json(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the input sampling_parameters says."""
    if "sampling_parameters" not in inputs:
        return {}
    try:
        given = parse_object(inputs["sampling_parameters"].encode())
    except BodyError as error:
        raise _invalid(f"sampling_parameters: {error}") from error
    for name in given:
        if name not in _SAMPLING:
            raise _invalid(
                f"sampling_parameters: {name[:100]!r} is not honoured here; use {', '.join(sorted(_SAMPLING))}"
            )
    return given


def _no_twice(inputs: Mapping[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters and "sampling_parameters" in inputs:
        name = next(iter(parameters))
        raise _invalid(f"parameter {name!r} is given beside the input sampling_parameters; put all into one of them")
    return parameters


def _number(name: str, value: Any) -> Any:
    """A number or truth that was sent as text, as what it says. ValueError where it says none."""
    if not isinstance(value, str) or name in _TEXTS:
        return value
    if name in _TRUTHS:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name}={value[:100]!r} must be true or false")
        return value.lower() == "true"
    try:
        return int(value) if name in _WHOLE else float(value)
    except ValueError:
        raise ValueError(f"{name}={value[:100]!r} must be a number") from None


def _chosen_outputs(request: pb.ModelInferRequest, produced: list[str]) -> tuple[str, ...]:
    """All that the request produces, or those that it names."""
    for output in request.outputs:
        refuse_unknown(output)
        if output.name not in produced:
            hint = f"set input return_{output.name}" if output.name in _OUTPUTS else f"use {', '.join(_OUTPUTS)}"
            raise _invalid(f"output {output.name[:100]!r} is not produced by this request; {hint}")
        for parameter in output.parameters:
            raise _invalid(
                f"parameter {parameter[:100]!r} of output {output.name!r} is not honoured here; leave it out"
            )
    names = [output.name for output in request.outputs]
    if len(set(names)) < len(names):
        raise _invalid(f"outputs {names} name one twice; name each once")
    return tuple(names or produced)


def _value(name: str, added: SequenceDelta | None, latest: SequenceDelta | None, prefix: str) -> Any:
    """One completion's element of an output. added: what this answer adds to it; latest: what was added last."""
    match name:
        case "text_output":
            return sendable(prefix + (added.text if added else "")).encode()
        case "num_output_tokens":
            return len(added.token_ids) if added else 0
        case "logprobs":
            return json.dumps([_logprobs(entry) for entry in (added.logprobs if added else None) or ()]).encode()
        case "finish_reason":
            return str(latest.finish_reason if latest else None).encode()
        case _:  # cumulative_logprob
            return (latest.cumulative_logprob if latest else None) or 0.0


def _logprobs(entry: Mapping[int, Logprob]) -> dict[int, dict[str, Any]]:
    return {
        token_id: {"logprob": own.logprob, "rank": own.rank, "decoded_token": own.decoded_token}
        for token_id, own in entry.items()
    }


def _add_output(answer: pb.ModelInferResponse, name: str, values: list[Any]) -> None:
    kind = _OUTPUTS[name]
    answer.outputs.add(name=name, datatype=kind, shape=[len(values)])
    if kind == "BYTES":
        raw = b"".join(struct.pack("<I", len(value)) + value for value in values)
    else:
        raw = struct.pack(f"<{len(values)}{'f' if kind == 'FP32' else 'I'}", *values)
    answer.raw_output_contents.append(raw)


def _failure(request: pb.ModelInferRequest, error: RequestError) -> pb.ModelStreamInferResponse:
    """Of a stream's request: there is no place for a status, so its name begins the text."""
    message = pb.ModelStreamInferResponse(error_message=f"{error.code}: {error.message}")
    message.infer_response.id = request.id
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)
