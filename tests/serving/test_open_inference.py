"""The Open Inference Protocol, driven by Triton's published client as it is: in one process with the server."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.grpc import aio as triton
from tritonclient.utils import InferenceServerException

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from serving.generated import open_inference_pb2 as pb
from serving.generated import open_inference_pb2_grpc
from serving.security import Tokens
from tests.serving.harness import GREEDY, Brake, address, connected, refused, run, serving

PROMPT = "one small prompt"
PARAMETERS = {"max_tokens": 12, **GREEDY}


def tensors(text: str | None = PROMPT, sampling: Any = None, **truths: bool) -> list[InferInput]:
    """Inputs as a program of Triton's vLLM backend makes them. sampling: for the input sampling_parameters."""
    result = []
    for name, value in (("text_input", text), ("sampling_parameters", sampling)):
        if value is not None:
            own = InferInput(name, [1], "BYTES")
            own.set_data_from_numpy(np.array([value if isinstance(value, str) else json.dumps(value)], dtype=object))
            result.append(own)
    for name, truth in truths.items():
        own = InferInput(name, [1], "BOOL")
        own.set_data_from_numpy(np.array([truth]))
        result.append(own)
    return result


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [element.decode() for element in result.as_numpy(name)]


def test_state_and_metadata(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine) as server, triton.InferenceServerClient(address(server)) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("small")
            assert await client.is_model_ready("small", "1")
            assert not await client.is_model_ready("big")
            assert not await client.is_model_ready("small", "2")
            assert (await client.get_server_metadata()).name == "jaxinfer"
            metadata = await client.get_model_metadata("small", as_json=True)
            assert metadata["name"] == "small"
            text = {tensor["name"]: tensor for tensor in metadata["inputs"]}["text_input"]
            assert text == {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
            for model, model_version in (("big", ""), ("small", "2")):
                with pytest.raises(InferenceServerException, match="is not served"):
                    await client.get_model_metadata(model, model_version)

    run(scenario())


def test_infer_is_the_engines_own(llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(**PARAMETERS))
    own = expected.outputs[0].text

    async def scenario() -> None:
        async with serving(llm.engine) as server, triton.InferenceServerClient(address(server)) as client:
            as_text = {name: str(value) for name, value in PARAMETERS.items()}
            for inputs, parameters in (
                (tensors(sampling=PARAMETERS), None),
                (tensors(sampling=as_text), None),
                (tensors(), PARAMETERS),
                (tensors(), as_text),
            ):
                result = await client.infer("small", inputs, request_id="mine", parameters=parameters)
                assert texts(result) == [PROMPT + own]
                assert result.get_response().id == "mine"
                assert [output.name for output in result.get_response().outputs] == ["text_output"]
            bare = tensors(sampling=PARAMETERS, exclude_input_in_output=True, stream=False)
            assert texts(await client.infer("small", bare)) == [own]

    run(scenario())


def test_more_outputs(llm: LLM) -> None:
    params = {"n": 3, "seed": 5, "max_tokens": 6, "logprobs": 1, "ignore_eos": True}
    (expected,) = llm.generate(PROMPT, SamplingParams(**params))
    names = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")

    async def scenario() -> None:
        async with serving(llm.engine) as server, triton.InferenceServerClient(address(server)) as client:
            wanted = {f"return_{name}": True for name in names}
            inputs = tensors(sampling=params, exclude_input_in_output=True, **wanted)
            result = await client.infer("small", inputs)
            assert texts(result) == [completion.text for completion in expected.outputs]
            assert texts(result, "finish_reason") == ["length"] * 3
            assert list(result.as_numpy("num_input_tokens")) == [len(expected.prompt_token_ids)]
            assert list(result.as_numpy("num_output_tokens")) == [6] * 3
            totals = [completion.cumulative_logprob for completion in expected.outputs]
            assert result.as_numpy("cumulative_logprob") == pytest.approx(totals, abs=1e-4)
            for given, completion in zip(texts(result, "logprobs"), expected.outputs, strict=True):
                entries = json.loads(given)
                assert [int(next(iter(entry))) for entry in entries] == completion.token_ids
                assert sum(next(iter(entry.values()))["logprob"] for entry in entries) == pytest.approx(
                    completion.cumulative_logprob, abs=1e-4
                )
            chosen = await client.infer("small", inputs, outputs=[InferRequestedOutput("finish_reason")])
            assert [output.name for output in chosen.get_response().outputs] == ["finish_reason"]
            assert chosen.as_numpy("text_output") is None

    run(scenario())


def test_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(**PARAMETERS))

    async def scenario() -> None:
        async with serving(llm.engine) as server, triton.InferenceServerClient(address(server)) as client:

            async def requests() -> AsyncIterator[dict[str, Any]]:
                streamed = tensors(sampling=PARAMETERS, stream=True, return_num_output_tokens=True)
                yield {"model_name": "small", "inputs": streamed, "request_id": "a"}
                yield {
                    "model_name": "small",
                    "inputs": streamed,
                    "request_id": "b",
                    "enable_empty_final_response": True,
                }
                yield {"model_name": "small", "inputs": tensors(sampling=PARAMETERS), "request_id": "whole"}
                yield {"model_name": "big", "inputs": streamed, "request_id": "bad"}

            pieces: dict[str, list[str]] = {}
            num_tokens: dict[str, int] = {}
            over: list[str] = []
            errors = []
            brake = Brake(llm.engine, monkeypatch)
            brake.let(6)
            async for result, error in client.stream_infer(requests()):
                if error is not None:
                    errors.append(str(error))
                    continue
                response = result.get_response()
                assert response.id not in over, "nothing comes after the last"
                pieces.setdefault(response.id, []).extend(texts(result))
                if response.id != "whole":
                    num_tokens[response.id] = num_tokens.get(response.id, 0) + result.as_numpy("num_output_tokens")[0]
                if response.parameters["triton_final_response"].bool_param:
                    over.append(response.id)
                if "a" in pieces:
                    brake.release()
            text = expected.outputs[0].text
            assert {name: "".join(own) for name, own in pieces.items()} == {
                "a": text,
                "b": text,
                "whole": PROMPT + text,
            }
            assert len(pieces["a"]) > 1, "it began while the engine was held"
            assert len(pieces["whole"]) == 1
            assert num_tokens == {"a": 12, "b": 12}
            assert sorted(over) == ["a", "b", "whole"]
            assert len(errors) == 1
            assert "NOT_FOUND: model='big' is not served" in errors[0]

    run(scenario())


def test_client_with_threads(llm: LLM) -> None:
    """The other client, whose stream calls back; stopping it with requests cancelled frees them."""
    (expected,) = llm.generate(PROMPT, SamplingParams(**PARAMETERS))

    def drive(where: str) -> None:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with InferenceServerClient(where) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer("small", tensors(sampling=PARAMETERS, stream=True))
            text = ""
            while True:
                result, error = answers.get(timeout=20)
                assert error is None
                text += "".join(texts(result))
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
            assert text == expected.outputs[0].text
            endless = {"max_tokens": 79, "ignore_eos": True}
            client.async_stream_infer("small", tensors(sampling=endless, stream=True))
            answers.get(timeout=20)
            client.stop_stream(cancel_requests=True)

    async def scenario() -> None:
        async with serving(llm.engine) as server:
            await asyncio.to_thread(drive, address(server))

    run(scenario())


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        (tensors(None), {}, "text_input is missing"),
        (tensors(""), {}, "the prompt is empty"),
        (tensors(stream=True), {}, "use ModelStreamInfer"),
        (tensors(stream=True, exclude_input_in_output=False), {}, "exclude_input_in_output is false"),
        (tensors(image=True), {}, "input 'image' is not honoured"),
        (tensors() + tensors("twice"), {}, "input 'text_input' is there twice"),
        (tensors(sampling="{"), {}, "sampling_parameters: not JSON"),
        (tensors(sampling="[" * 100000), {}, "sampling_parameters: JSON is nested too deeply"),
        (tensors(sampling='{"seed": 1, "seed": 2}'), {}, "sampling_parameters: the key 'seed' is there twice"),
        (tensors(sampling='{"temperature": 1%s}' % ("0" * 400)), {}, "must be a finite number"),
        (tensors(sampling=[1]), {}, "must be a JSON object"),
        (tensors(sampling={"beam_width": 2}), {}, "'beam_width' is not honoured"),
        (tensors(sampling={"temperature": "warm"}), {}, "temperature='warm' must be a number"),
        (tensors(sampling={"top_p": 2}), {}, "top_p=2"),
        (tensors(sampling={"ignore_eos": "maybe"}), {}, "ignore_eos='maybe'"),
        (tensors(sampling={"stop": "\ud800"}), {"parameters": {"n": 1}}, "parameter 'n' is given beside"),
        (tensors(return_logprobs=True), {}, "sampling parameter logprobs is unset"),
        (tensors(), {"parameters": {"lora_name": "x"}}, "parameter 'lora_name' is not honoured"),
        (tensors(), {"sequence_id": 7, "sequence_start": True}, "is not honoured"),
        (tensors(), {"priority": 1}, "parameter 'priority' is not honoured"),
        (tensors(), {"outputs": [InferRequestedOutput("logprobs")]}, "set input return_logprobs"),
        (tensors(), {"outputs": [InferRequestedOutput("text_output", class_count=2)]}, "parameter 'classification'"),
        (tensors(), {"model_version": "3"}, "model_version='3' is not served"),
        (tensors(), {"request_id": "x" * 257}, "id has 257 characters"),
    ],
)
def test_what_is_not_honoured_is_refused(
    engine: Engine, inputs: list[InferInput], options: dict[str, Any], words: str
) -> None:
    async def scenario() -> None:
        async with serving(engine) as server, triton.InferenceServerClient(address(server)) as client:
            with pytest.raises(InferenceServerException) as caught:
                await client.infer("small", inputs, **options)
            assert words in (caught.value.message() or "")
            assert caught.value.status() in ("StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")

    run(scenario())


def test_typed_contents_and_malformed_tensors(llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, **GREEDY))

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            infer = open_inference_pb2_grpc.GRPCInferenceServiceStub(client._channel).ModelInfer

            def request(**fields: Any) -> pb.ModelInferRequest:
                result = pb.ModelInferRequest(model_name="small")
                for name, value in {"max_tokens": 4, "temperature": 0, "ignore_eos": True}.items():
                    kind = "bool_param" if value is True else "int64_param"
                    setattr(result.parameters[name], kind, value)
                text = {"name": "text_input", "datatype": "BYTES", "shape": [1], **fields}
                result.inputs.add(**text)
                return result

            def typed(**contents: Any) -> pb.InferTensorContents:
                return pb.InferTensorContents(**contents)

            answer = await infer(request(contents=typed(bytes_contents=[PROMPT.encode()])))
            assert answer.raw_output_contents[0][4:].decode() == PROMPT + expected.outputs[0].text
            for bad, words in (
                (request(), "one element in bytes_contents"),
                (request(contents=typed(bytes_contents=[b"a", b"b"])), "one element in bytes_contents"),
                (request(contents=typed(int_contents=[1])), "one element in bytes_contents"),
                (request(contents=typed(bytes_contents=[b"\xff"])), "no UTF-8"),
                (request(contents=typed(bytes_contents=[b"a"]), shape=[2]), "shape [1]"),
                (request(contents=typed(bytes_contents=[b"a"]), datatype="FP32"), "BYTES of shape"),
            ):
                await refused(infer(bad), "INVALID_ARGUMENT", words)
            for raw, words in (
                ([], "one element in bytes_contents"),
                ([b"\1\0"], "not a length and so many bytes"),
                ([b"\2\0\0\0a"], "not a length and so many bytes"),
                ([b"\1\0\0\0a", b""], "2 entries for 1 inputs"),
            ):
                bad = request()
                bad.raw_input_contents.extend(raw)
                await refused(infer(bad), "INVALID_ARGUMENT", words)
            both = request(contents=typed(bytes_contents=[b"a"]))
            both.raw_input_contents.append(b"\1\0\0\0a")
            await refused(infer(both), "INVALID_ARGUMENT", "give one of them")

    run(scenario())


def test_time_limit_and_token(engine: Engine) -> None:
    async def scenario() -> None:
        tokens = Tokens(["a-token-of-some-length"])
        async with (
            serving(engine, tokens=tokens) as server,
            triton.InferenceServerClient(address(server)) as client,
        ):
            with pytest.raises(InferenceServerException, match="authorization"):
                await client.is_server_live()
            headers = {"authorization": "Bearer a-token-of-some-length"}
            result = await client.infer("small", tensors(), headers=headers, timeout=20_000_000)
            assert texts(result)[0].startswith(PROMPT)
            with pytest.raises(InferenceServerException, match="queue_time_limit_ms=0 passed"):
                await client.infer("small", tensors(), headers=headers, timeout=1)

    run(scenario())
