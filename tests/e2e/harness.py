"""The engine's slow twin (the cacheless forward), a small model with a tokenizer, and drivers for the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer.engine
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine, make_request
from jaxinfer.loading import LoadedModel
from jaxinfer.types import RequestOutput, SamplingParams

GOLDENS = Path(__file__).parents[1] / "conformance" / "goldens"
VOCAB_SIZE = 96
EOS = 2
# Engine and twin sum in different orders; the logits they are compared by lie within +-10 or so.
TOLERANCE = 2e-4

Prompt = Sequence[int]


def copy_with_tokenizer(golden: str, directory: Path) -> Path:
    """A golden checkpoint with a tokenizer of one token for each printable character: 0 to 2 are special, 3 is " "."""
    shutil.copytree(GOLDENS / golden, directory, dirs_exist_ok=True)
    characters = [chr(code) for code in range(ord(" "), ord(" ") + VOCAB_SIZE - 3)]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for index, text in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: index for index, text in enumerate(special + characters)},
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def text_of(token_ids: Iterable[int]) -> str:
    """What that tokenizer makes of token ids, special ones left out."""
    return "".join(chr(ord(" ") + token_id - 3) for token_id in token_ids if token_id > 2)


def few_programs(monkeypatch: pytest.MonkeyPatch, token_buckets: tuple[int, ...] = ()) -> None:
    """Engines made from now on pad to few sizes: a test pays for each program with seconds of compilation.

    token_buckets: () is 4 and the largest step; one sampler serves all.
    """
    resolve = jaxinfer.engine.resolve

    def resolve_to_few(*arguments: Any) -> Any:
        plan = resolve(*arguments)
        tokens = token_buckets or (min(4, plan.max_num_batched_tokens), plan.max_num_batched_tokens)
        return replace(plan, token_buckets=tokens, sequence_buckets=(plan.max_num_seqs,))

    monkeypatch.setattr(jaxinfer.engine, "resolve", resolve_to_few)


def make_engine(loaded: LoadedModel, **settings: Any) -> Engine:
    small = {"max_model_len": 96, "page_size": 4, "num_pages": 30, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return Engine(EngineConfig(str(loaded.directory), **{**small, **settings}), loaded=loaded)


class Twin:
    """Logits of whole sequences without cache, batch or chunks, in one program: sequences are padded to `length`."""

    def __init__(self, loaded: LoadedModel, length: int) -> None:
        self.params = loaded.params
        self.length = length
        self._forward = jax.jit(lambda params, tokens: loaded.model.forward(params, tokens, context_len=length))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: row i is the distribution of token i + 1."""
        padded = np.zeros(self.length, np.int32)
        padded[: len(token_ids)] = token_ids
        return np.asarray(self._forward(self.params, jnp.asarray(padded)))[: len(token_ids)]

    def log_probabilities(self, token_ids: Sequence[int]) -> np.ndarray:
        logits = self.logits(token_ids).astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def check(self, output: RequestOutput, greedy: bool = True) -> None:
        """AssertionError unless the output is what the twin computes: log-probabilities, and greedy choices if asked.

        greedy: nothing but the model moves the choices of a request at temperature 0.

        Greedy choices are held to the largest logit given the tokens before, so a tie cannot fail.
        """
        params = PARAMS_OF[output.request_id]
        assert output.finished, output
        assert output.error is None, output
        for completion in output.outputs:
            tokens = output.prompt_token_ids + completion.token_ids
            expected = self.log_probabilities(tokens)
            first = len(output.prompt_token_ids) - 1
            if greedy and params.temperature == 0:
                chosen = expected[np.arange(first, len(tokens) - 1), completion.token_ids]
                assert np.all(expected[first:-1].max(-1) - chosen < TOLERANCE), f"{output.request_id} is not greedy"
            if completion.logprobs is not None:
                assert len(completion.logprobs) == len(completion.token_ids)
                check_logprobs(completion.logprobs, completion.token_ids, expected[first:], params.logprobs or 0)
                total = sum(
                    entry[t].logprob for entry, t in zip(completion.logprobs, completion.token_ids, strict=True)
                )
                assert completion.cumulative_logprob == pytest.approx(total)
        if output.prompt_logprobs is not None:
            expected = self.log_probabilities(output.prompt_token_ids)
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
            entries = [entry for entry in output.prompt_logprobs if entry is not None]
            check_logprobs(entries, output.prompt_token_ids[1:], expected, params.prompt_logprobs or 0)


def check_logprobs(
    entries: Sequence[Mapping[int, Any]], token_ids: Sequence[int], expected: np.ndarray, num_top: int
) -> None:
    assert len(entries) == len(token_ids)
    for entry, token_id, row in zip(entries, token_ids, expected, strict=False):
        assert next(iter(entry)) == token_id, "the token itself comes first"
        assert num_top <= len(entry) <= num_top + 1
        for other, scored in entry.items():
            assert abs(scored.logprob - row[other]) < TOLERANCE
        best = sorted((scored.rank, other) for other, scored in entry.items() if scored.rank <= num_top)
        assert [rank for rank, _ in best] == list(range(1, num_top + 1))
        best_values = np.sort(row)[::-1][:num_top]
        assert np.allclose([row[other] for _, other in best], best_values, atol=TOLERANCE)


# The parameters of every request that a test has added, for `Twin.check`.
PARAMS_OF: dict[str, SamplingParams] = {}
_numbers = iter(range(10**9))


def add(engine: Engine, prompt: Prompt, params: SamplingParams, **arguments: Any) -> str:
    """Add a request under a name of its own; its id."""
    request_id = f"test-{next(_numbers)}"
    PARAMS_OF[request_id] = params
    engine.add_request(make_request(engine, request_id, list(prompt), params, **arguments))
    return request_id


def step(engine: Engine) -> list[RequestOutput]:
    """One step, with the books proven."""
    outputs = engine.step()
    engine.scheduler.check_integrity()
    return outputs


def finish(engine: Engine, then: Callable[[int], None] | None = None, limit: int = 2000) -> dict[str, RequestOutput]:
    """Step until nothing is left; finished outputs by id. then(i) is called after step i."""
    done: dict[str, RequestOutput] = {}
    for number in range(limit):
        for output in step(engine):
            if output.finished:
                assert output.request_id not in done, "a request finished twice"
                done[output.request_id] = output
        if then is not None:
            then(number)
        if not engine.has_unfinished():
            return done
    raise AssertionError(f"not finished after {limit} steps: {engine.scheduler.stats()}")


def run(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams], **arguments: Any
) -> list[RequestOutput]:
    """Run prompts together, outputs in their order."""
    several = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ids = [add(engine, prompt, own, **arguments) for prompt, own in zip(prompts, several, strict=True)]
    done = finish(engine)
    return [done[request_id] for request_id in ids]


def tokens_of(outputs: Iterable[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def random_prompt(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token_id) for token_id in rng.integers(3, VOCAB_SIZE, length)]


def random_prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [random_prompt(rng, length) for length in lengths]


def greedy(max_tokens: int | None, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def num_pages_held(engine: Engine) -> int:
    return engine.scheduler.stats().kv.num_held
