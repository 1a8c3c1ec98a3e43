"""Log-probabilities are the model's own, whatever the request does to the logits."""

from __future__ import annotations

import jax
import numpy as np

from jaxinfer.sampling.logprobs import score
from jaxinfer.types import MAX_LOGPROBS, SamplingParams
from tests.sampling import twin
from tests.sampling.harness import Row, sample_rows

scored = jax.jit(score)


def check(logits, tokens, got):
    for i, (x, token) in enumerate(zip(logits, tokens, strict=True)):
        want = np.log(twin.softmax(np.asarray(x, np.float64)))
        assert abs(got.logprob[i] - want[token]) < 1e-5
        assert got.rank[i] == 1 + np.sum(x > x[token])
        best = np.argsort(-want, kind="stable")[:MAX_LOGPROBS]
        assert got.top_token_ids[i].tolist() == best.tolist()
        np.testing.assert_allclose(got.top_logprobs[i], want[best], atol=1e-5)


def test_sampled_tokens():
    logits = np.random.default_rng(0).normal(size=(6, 203)).astype(np.float32) * 4
    rows = [
        Row(SamplingParams(temperature=3.0, logprobs=5), 1),
        Row(SamplingParams(temperature=0, logprobs=0), 2),
        Row(SamplingParams(top_k=3, logprobs=MAX_LOGPROBS), 3),
        Row(SamplingParams(logit_bias={5: 80.0}, logprobs=1), 4),
        Row(SamplingParams(banned_token_ids=[int(np.argmax(logits[4]))], temperature=0, logprobs=2), 5),
        Row(SamplingParams(temperature=0), 6),
    ]
    output = sample_rows(logits, rows)
    check(logits, output.token_ids, output.logprobs)
    assert output.logprobs.rank[1] == 1
    assert output.logprobs.rank[4] == 2
    assert output.token_ids[3] == 5


def test_prompt_tokens():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(9, 777)).astype(np.float32)
    targets = rng.integers(0, 777, 9)
    got = jax.tree.map(np.asarray, scored(logits, targets))
    check(logits, targets, got)


def test_ties_share_a_rank():
    logits = np.zeros((1, 50), np.float32)
    logits[0, :3] = 1.0
    got = scored(logits, np.array([2]))
    assert got.rank.tolist() == [1]
    assert scored(logits, np.array([7])).rank.tolist() == [4]


def test_a_vocabulary_smaller_than_the_list():
    logits = np.random.default_rng(2).normal(size=(2, 11)).astype(np.float32)
    got = scored(logits, np.array([10, 0]))
    assert got.top_token_ids.shape == (2, 11)
    check(logits, [10, 0], jax.tree.map(np.asarray, got))


def test_nobody_asked():
    logits = np.random.default_rng(2).normal(size=(2, 203)).astype(np.float32)
    output = sample_rows(logits, [Row(SamplingParams(temperature=0))] * 2)
    assert not output.logprobs.top_logprobs.any()
    assert not output.logprobs.logprob.any()
