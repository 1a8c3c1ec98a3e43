"""What the service answers is what the engine itself gives, however it is asked."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc.aio import EOF

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.types import RequestOutput, SamplingParams
from serving import engine_loop
from serving.client import Client, Failure, Generation, make_request
from serving.generated import inference_pb2 as pb
from tests.e2e.harness import EOS
from tests.serving.harness import GREEDY, Brake, address, collect, connected, refused, run, serving, submitted

PROMPT = "one small prompt"


def check(answer: Generation, expected: RequestOutput) -> None:
    assert answer.usage is not None
    assert answer.timings is not None
    assert [completion.text for completion in answer.completions] == [own.text for own in expected.outputs]
    assert [completion.token_ids for completion in answer.completions] == [own.token_ids for own in expected.outputs]
    assert [completion.finish_reason for completion in answer.completions] == [
        own.finish_reason for own in expected.outputs
    ]
    assert answer.prompt is not None
    assert answer.prompt.num_tokens == answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == sum(len(own.token_ids) for own in expected.outputs)
    times = answer.timings
    assert 0 <= times.queue <= times.time_to_first_token <= times.total
    assert times.total == pytest.approx(times.time_to_first_token + times.decode)


async def begun_while_held(engine: Engine, patch: pytest.MonkeyPatch, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The stream, with the engine held after some steps until the first message has come."""
    with Brake(engine, patch) as brake:
        brake.let(4)
        yield await anext(stream)
    async for message in stream:
        yield message


def test_unary_and_stream_are_the_engines_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, **GREEDY))

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            check(await client.generate(PROMPT, max_tokens=24, **GREEDY), expected)
            check(await client.generate(expected.prompt_token_ids, max_tokens=24, **GREEDY), expected)
            stream = client.stream(PROMPT, max_tokens=24, request_id="mine", **GREEDY)
            whole, messages = await collect(begun_while_held(llm.engine, monkeypatch, stream))
            check(whole, expected)
            assert len(messages) > 1
            assert {message.request_id for message in messages} == {"mine"}

    run(scenario())


def test_unset_is_not_zero(llm: LLM) -> None:
    """Unset max_tokens is 16 and unset temperature 1; a temperature of 0 is greedy."""
    (greedy,) = llm.generate(PROMPT, SamplingParams(temperature=0, ignore_eos=True))
    (drawn,) = llm.generate(PROMPT, SamplingParams(seed=5, ignore_eos=True))
    assert greedy.outputs[0].token_ids != drawn.outputs[0].token_ids

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            check(await client.generate(PROMPT, temperature=0, ignore_eos=True), greedy)
            check(await client.generate(PROMPT, seed=5, ignore_eos=True), drawn)

    run(scenario())


def test_several_completions_and_a_seed_amid_others(llm: LLM) -> None:
    params = {"n": 3, "seed": 7, "max_tokens": 12, "top_p": 0.9, "ignore_eos": True}
    (expected,) = llm.generate(PROMPT, SamplingParams(**params))
    assert len({tuple(completion.token_ids) for completion in expected.outputs}) == 3

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            others = [asyncio.create_task(client.generate("x" * i, max_tokens=20, n=2)) for i in range(3, 9)]
            check(await client.generate(PROMPT, **params), expected)
            whole, _ = await collect(client.stream(PROMPT, **params))
            check(whole, expected)
            await asyncio.gather(*others)

    run(scenario())


def test_logprobs(llm: LLM) -> None:
    (expected,) = llm.generate(
        PROMPT, SamplingParams(max_tokens=6, seed=1, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    )
    completion = expected.outputs[0]
    assert completion.logprobs is not None
    assert expected.prompt_logprobs is not None

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            options = {"max_tokens": 6, "seed": 1, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True}
            for answer in (
                await client.generate(PROMPT, prompt_token_ids=True, **options),
                (await collect(client.stream(PROMPT, prompt_token_ids=True, **options)))[0],
            ):
                own = answer.completions[0]
                assert answer.prompt is not None
                assert list(answer.prompt.token_ids) == expected.prompt_token_ids
                assert not answer.prompt.logprobs[0].HasField("logprob")
                scored = [*zip(own.logprobs, completion.logprobs or (), strict=True)]
                prompt = zip(answer.prompt.logprobs[1:], (expected.prompt_logprobs or [])[1:], strict=True)
                for number, (given, entry) in enumerate([*scored, *prompt]):
                    assert entry is not None
                    best = sorted((item.rank or 0, token_id) for token_id, item in entry.items())
                    num_top = 2 if number < len(scored) else 1
                    assert [top.token_id for top in given.top] == [token_id for _, token_id in best[:num_top]]
                    assert given.rank == entry[given.token_id].rank
                    assert given.text == entry[given.token_id].decoded_token
                    assert given.logprob == pytest.approx(entry[given.token_id].logprob, abs=1e-4)
                assert own.finish is not None
                assert own.finish.cumulative_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-4)
            plain = await client.generate(PROMPT, max_tokens=2, text=False, token_ids=False, **GREEDY)
            assert (plain.text, plain.completions[0].token_ids, plain.completions[0].logprobs) == ("", [], [])
            assert plain.completions[0].finish is not None
            assert plain.completions[0].finish.completion_tokens == 2

    run(scenario())


def test_what_stopped_it_is_said(llm: LLM) -> None:
    (free,) = llm.generate(PROMPT, SamplingParams(max_tokens=24, **GREEDY))
    text, token_ids = free.outputs[0].text, free.outputs[0].token_ids
    stop = text[5:8]

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):

            async def finish(**options: object) -> tuple[str, pb.Finish]:
                answer, _ = await collect(client.stream(PROMPT, max_tokens=24, temperature=0, **options))
                assert answer.completions[0].finish is not None
                return answer.text, answer.completions[0].finish

            own, finished = await finish(stop=[stop, "never seen"], ignore_eos=True)
            assert own == text[: text.index(stop)]
            assert (finished.reason, finished.stop_string) == (pb.FINISH_REASON_STOP, stop)
            own, _ = await finish(stop=stop, include_stop=True, ignore_eos=True)
            assert own == text[: text.index(stop) + len(stop)]
            _, finished = await finish(stop_token_ids=[token_ids[4]], ignore_eos=True)
            assert (finished.reason, finished.stop_token_id) == (pb.FINISH_REASON_STOP, token_ids[4])
            assert finished.completion_tokens == token_ids.index(token_ids[4]) + 1
            own, finished = await finish(logit_bias={EOS: 100.0})
            assert (own, finished.WhichOneof("stop"), finished.end_token_id) == ("", "end_token_id", EOS)
            _, finished = await finish(ignore_eos=True)
            assert (finished.reason, finished.WhichOneof("stop")) == (pb.FINISH_REASON_LENGTH, None)

    run(scenario())


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    rendered = llm.engine.tokenizer.encode("user: hello answer: ")
    (expected,) = llm.generate(rendered, SamplingParams(max_tokens=8, **GREEDY))

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            check(await client.generate(messages, max_tokens=8, **GREEDY), expected)
            request = make_request(messages, max_tokens=1, prompt_token_ids=True)
            request.chat.template_arguments["opening"] = "reply"
            answer = await client._inference.Generate(request)
            assert list(answer.prompt.token_ids) == llm.engine.tokenizer.encode("user: hello reply: ")
            for name in ("chat_template", "tokenize", "tokenizer_kwargs"):
                request = make_request(messages)
                request.chat.template_arguments[name] = "{{ 1 }}"
                await refused(client._inference.Generate(request), "INVALID_ARGUMENT", name, "template_arguments")

    run(scenario())


def test_many_with_a_status_each(llm: LLM) -> None:
    prompts = [PROMPT[:length] for length in range(3, 13)]
    expected = llm.generate(prompts, SamplingParams(max_tokens=8, **GREEDY))

    async def scenario() -> None:
        async with connected(llm.engine) as (_, client):
            requests = [make_request(prompt, max_tokens=8, **GREEDY) for prompt in prompts]
            requests[2] = make_request(prompts[2], top_p=3)
            requests[5] = make_request(prompts[5], model="another")
            answers = {number: answer async for number, answer in client.generate_many(requests)}
            assert sorted(answers) == list(range(len(prompts)))
            for number, answer in answers.items():
                if number in (2, 5):
                    assert isinstance(answer, Failure)
                    assert answer.code == {2: "INVALID_ARGUMENT", 5: "NOT_FOUND"}[number]
                else:
                    assert isinstance(answer, Generation)
                    check(answer, expected[number])

    run(scenario())


def test_many_streamed(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas of several items in one call, each item's without a gap, one status each."""
    prompts = [PROMPT[:length] for length in (4, 9)]
    expected = llm.generate(prompts, SamplingParams(max_tokens=10, **GREEDY))

    async def scenario() -> None:
        async with connected(llm.engine) as (server, client):
            call = client._inference.GenerateMany()
            wholes = [Generation(), Generation()]
            counts, statuses = [0, 0], [0, 0]
            brake = Brake(llm.engine, monkeypatch)
            for prompt in prompts:
                await call.write(
                    pb.GenerateManyRequest(request=make_request(prompt, max_tokens=10, **GREEDY), stream=True)
                )
            await submitted(server, 2)
            brake.let(4)
            while sum(statuses) < 2:  # answers come before the client has sent everything
                message = await call.read()
                assert message.response.seq == counts[message.item]
                counts[message.item] += 1
                statuses[message.item] += message.HasField("status")
                wholes[message.item].add(message.response)
                if all(counts):
                    brake.release()
            await call.done_writing()
            assert await call.read() is EOF
            assert statuses == [1, 1]
            assert min(counts) > 1, "both began while the engine was held"
            for whole, own in zip(wholes, expected, strict=True):
                check(whole, own)

    run(scenario())


def test_models(engine: Engine) -> None:
    async def scenario() -> None:
        async with connected(engine) as (_, client):
            (model,) = await client.models()
            assert (model.name, model.max_model_len, model.vocab_size) == ("small", 96, 96)
            assert (model.has_tokenizer, model.has_chat_template, list(model.end_token_ids)) == (True, True, [EOS])
            token_ids = await client.tokenize(PROMPT)
            assert token_ids == engine.tokenizer.encode(PROMPT)
            assert await client.detokenize(token_ids) == PROMPT
            await refused(client.detokenize([96]), "INVALID_ARGUMENT", "token_ids", "96", "95")

    run(scenario())


def test_plain_client(llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, SamplingParams(max_tokens=8, **GREEDY))

    async def scenario() -> None:
        async with serving(llm.engine) as server:

            def work() -> None:
                with Client(address(server), timeout=30) as client:
                    assert client.is_serving()
                    check(client.generate(PROMPT, max_tokens=8, **GREEDY), expected)
                    whole = Generation()
                    for message in client.stream(PROMPT, max_tokens=8, **GREEDY):
                        whole.add(message)
                    check(whole, expected)
                    requests = [make_request(PROMPT, max_tokens=8, **GREEDY)] * 3
                    answers = dict(client.generate_many(requests))
                    assert sorted(answers) == [0, 1, 2]
                    for answer in answers.values():
                        assert isinstance(answer, Generation)
                        check(answer, expected)
                    assert client.detokenize(client.tokenize(PROMPT)) == PROMPT
                    assert [model.name for model in client.models()] == ["small"]

            await asyncio.to_thread(work)

    run(scenario())


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "expected"),
    [
        ("cpu", ["cuda"], None, True),
        ("cuda,cpu", [], None, False),
        (None, [], None, True),
        (None, ["cuda"], None, False),
        (None, [], object(), False),
    ],
)
def test_an_accelerators_thread_comes_after_nobody(
    platforms: str | None, plugins: list[str], libtpu: object, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_loop, "entry_points", lambda group: plugins)
    monkeypatch.setattr(engine_loop, "find_spec", lambda name: libtpu)
    assert engine_loop.has_cpu_only(platforms) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_who_computes_comes_after_who_talks(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine) as server:
            thread = server.frontend.engine._thread
            assert thread is not None
            assert thread.native_id is not None
            assert os.getpriority(os.PRIO_PROCESS, thread.native_id) > os.getpriority(os.PRIO_PROCESS, 0)

    run(scenario())
