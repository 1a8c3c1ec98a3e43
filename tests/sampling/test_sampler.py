"""The compiled sampler against its float64 twin, and what a row may never depend on."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.types import SamplingParams
from tests.sampling import harness, twin
from tests.sampling.harness import Batch, Row, draw_many, sample_rows

V = 203  # not a multiple of the group size: padding is exercised


def logits_of(seed, rows=1, vocab_size=V, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab_size)) * scale).astype(np.float32)


def chi_square(counts, probabilities):
    """(statistic - dof) / sqrt(2 dof): about standard normal if the hypothesis holds. Cells under 5 are pooled."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0
    statistic = np.sum((observed[keep] - expected[keep]) ** 2 / expected[keep])
    dof = keep.sum() - 1
    return (statistic - dof) / np.sqrt(2 * dof)


def samples(params, count, seed=5):
    return [Row(params, seed, index) for index in range(count)]


CASES = {
    "temperature 1": SamplingParams(),
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 3": SamplingParams(temperature=3.0),
    "top-k": SamplingParams(top_k=7),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.1),
    "typical-p": SamplingParams(typical_p=0.6),
    "all filters": SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02, typical_p=0.8),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_twins_distribution(name):
    logits = logits_of(11)[0]
    want = twin.distribution(logits, CASES[name])
    tokens = draw_many(logits, samples(CASES[name], 8192))
    assert abs(chi_square(np.bincount(tokens, minlength=V), want)) < 4


def test_the_statistic_notices_a_wrong_distribution():
    logits = logits_of(11)[0]
    tokens = draw_many(logits, samples(SamplingParams(), 8192))
    wrong = twin.distribution(logits, SamplingParams(temperature=1.15))
    assert abs(chi_square(np.bincount(tokens, minlength=V), wrong)) > 6


def test_positions_seeds_and_samples_are_independent_streams():
    logits, uniform, params = np.zeros(V, np.float32), np.full(V, 1 / V), SamplingParams()
    batch = Batch(V)
    batch.table.set(3, params, seed=9)  # one sequence at 4096 positions, 512 to a step
    by_position = np.concatenate(
        [
            batch.step(np.zeros((512, V)), [3] * 512, range(start, start + 512), 512).token_ids
            for start in range(0, 4096, 512)
        ]
    )
    by_seed = draw_many(logits, [Row(params, seed) for seed in range(4096)])
    by_sample = draw_many(logits, samples(params, 4096, seed=9))
    for tokens in (by_position, by_seed, by_sample):
        assert abs(chi_square(np.bincount(tokens, minlength=V), uniform)) < 4
        first, second = tokens[:-1].astype(int) % 16, tokens[1:].astype(int) % 16
        sixteenth = np.bincount(np.arange(V) % 16) / V
        pairs = np.bincount(first * 16 + second, minlength=256)
        assert abs(chi_square(pairs, np.outer(sixteenth, sixteenth).ravel())) < 4
    for one, other in ((by_position, by_sample), (by_seed, by_sample), (by_seed, by_position)):
        assert np.mean(one == other) < 0.02


ADJUSTED = {
    "logit bias": Row(SamplingParams(temperature=0, logit_bias={3: 50.0, 4: 60.0})),
    "banned": Row(SamplingParams(temperature=0, banned_token_ids=range(100))),
    "allowed": Row(SamplingParams(temperature=0, allowed_token_ids=[8, 9, 150], logit_bias={9: 20.0})),
    "repetition": Row(SamplingParams(temperature=0, repetition_penalty=3.0), prompt=range(150), output=[7, 199]),
    "repetition below 1": Row(SamplingParams(temperature=0, repetition_penalty=0.2), prompt=[5, 6], output=[7, 8]),
    "presence": Row(SamplingParams(temperature=0, presence_penalty=5.0), prompt=range(100), output=range(50, 200)),
    "frequency": Row(SamplingParams(temperature=0, frequency_penalty=1.0), output=list(range(150)) * 3 + [160] * 9),
    "min tokens": Row(SamplingParams(temperature=0, min_tokens=4), output=[1, 2], stop_token_ids=range(120)),
    "min tokens reached": Row(SamplingParams(temperature=0, min_tokens=2), output=[1, 2], stop_token_ids=range(120)),
    "everything": Row(
        SamplingParams(
            temperature=0,
            logit_bias={i: 0.1 * i for i in range(50)},
            banned_token_ids=range(10, 30),
            repetition_penalty=1.4,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            min_tokens=90,
            max_tokens=99,
        ),
        prompt=range(0, V, 2),
        output=list(range(0, V, 3)) + [5] * 4,
        stop_token_ids=[33, 40],
    ),
}


@pytest.mark.parametrize("name", ADJUSTED)
def test_greedy_on_adjusted_logits(name):
    row = ADJUSTED[name]
    logits = logits_of(3, rows=8)
    tokens = sample_rows(logits, [row] * 8).token_ids
    want = [np.argmax(twin.adjusted(x, row.params, row.prompt, row.output, row.stop_token_ids)) for x in logits]
    assert tokens.tolist() == want
    if name != "min tokens reached":
        assert tokens.tolist() != np.argmax(logits, -1).tolist(), "the case does not exercise its feature"


def test_counts_grow_with_the_tokens_sampled():
    """Penalties over a generated sequence, step by step, equal the twin's that is told the whole history."""
    params = SamplingParams(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7, min_tokens=6
    )
    batch = Batch(V)
    batch.put(2, Row(params, prompt=[1, 2, 3], stop_token_ids=[50]))
    output = []
    for i in range(20):
        logits = logits_of(100)[0] + 0.3 * logits_of(i)[0]
        logits[50] = 9.0
        token = batch.step(logits, [2], [i]).token_ids[0]
        assert token == np.argmax(twin.adjusted(logits, params, [1, 2, 3], output, [50]))
        output.append(int(token))
    assert 50 not in output[:6]
    assert 50 in output[6:]


MIX = [
    Row(SamplingParams(temperature=0)),
    Row(SamplingParams(), 1),
    Row(SamplingParams(top_k=5), 2),
    Row(SamplingParams(top_p=0.7, temperature=0.8), 3),
    Row(SamplingParams(min_p=0.05), 4),
    Row(SamplingParams(typical_p=0.5), 5),
    Row(SamplingParams(repetition_penalty=1.5), 6, prompt=[1, 2], output=[3]),
    Row(SamplingParams(temperature=0, logit_bias={4: 3.0}, logprobs=3), 7),
    Row(SamplingParams(allowed_token_ids=[9, 11, 13, 15]), 8),
    Row(SamplingParams(top_k=30, top_p=0.9, min_p=0.01, typical_p=0.9, presence_penalty=0.5), 9, output=[1, 2, 3]),
    Row(SamplingParams(min_tokens=9, top_k=3), 10, stop_token_ids=[0, 1, 2]),
    Row(SamplingParams(temperature=1e-6, top_p=0.5, logprobs=0), 11),
]


def test_a_row_depends_on_nothing_but_itself():
    """Alone, in any slot, any bucket, amid others: the same tokens."""
    steps = [logits_of(40 + i, rows=len(MIX)) for i in range(6)]
    orders = [np.arange(len(MIX)), np.random.default_rng(0).permutation(len(MIX))]
    results = []
    for order, num_rows in ((orders[0], 16), (orders[1], 16), (orders[1], 512)):
        batch = Batch(V)
        slots = np.random.default_rng(len(results)).permutation(512)[: len(MIX)]
        for slot, i in zip(slots, order, strict=True):
            batch.put(int(slot), MIX[i])
        tokens = np.zeros((len(steps), len(MIX)), int)
        for position, logits in enumerate(steps):
            positions = [len(MIX[i].output) + position for i in order]
            output = batch.step(logits[order], slots, positions, num_rows)
            assert not output.invalid.any()
            tokens[position, order] = output.token_ids
            assert np.asarray(batch.state.last_tokens)[slots].tolist() == output.token_ids.tolist()
        results.append(tokens)
    alone = np.zeros_like(results[0])
    for i, row in enumerate(MIX):
        batch = Batch(V)
        batch.put(7, row)
        for position, logits in enumerate(steps):
            alone[position, i] = batch.step(logits[i], [7], [len(row.output) + position], 1).token_ids[0]
    for tokens in results:
        assert tokens.tolist() == alone.tolist()


def test_re_entry_after_preemption_changes_nothing():
    row = Row(SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, min_tokens=12), 3, prompt=[5, 6, 7])
    row.stop_token_ids = [9]
    batch = Batch(V)
    batch.put(0, row)
    steps = logits_of(8, rows=16, scale=1.0)
    output = [int(batch.step(x, [0], [i]).token_ids[0]) for i, x in enumerate(steps)]
    other = Batch(V)
    other.put(3, Row(SamplingParams(presence_penalty=2.0), 77, prompt=range(V), output=[1]))  # leaves stale rows
    other.step(steps[0], [3], [1])
    row.output = output[:8]
    other.put(3, row)
    again = [int(other.step(x, [3], [8 + i]).token_ids[0]) for i, x in enumerate(steps[8:])]
    assert again == output[8:]


def test_stale_rows_do_not_matter():
    batch = Batch(V)
    batch.put(0, Row(SamplingParams(temperature=0, banned_token_ids=range(V - 1))))
    assert batch.step(logits_of(1), [0], [0]).token_ids.tolist() == [V - 1]
    batch.put(0, Row(SamplingParams(temperature=0)))
    batch.put(1, Row(SamplingParams(temperature=0, logit_bias={0: 1.0})))  # so that the dense branch runs
    tokens = batch.step(logits_of(1, rows=2), [0, 1], [0, 0]).token_ids
    assert tokens[0] == np.argmax(logits_of(1, rows=2)[0])


def test_seeds_reproduce_and_differ():
    logits = np.zeros((8, V))
    seeds = sample_rows(logits, [Row(SamplingParams(), seed) for seed in (0, 1, 2, 2**31, 2**32 - 1, 1, 0, 2)])
    tokens = seeds.token_ids.tolist()
    assert tokens[5:] == [tokens[1], tokens[0], tokens[2]]
    assert len(set(tokens)) == 5


def test_no_mix_of_features_compiles_again():
    batch = Batch(V)
    harness.traces.clear()
    batch.step(logits_of(0, rows=3), [0, 1, 2], [0, 0, 0])
    start, size = len(harness.traces), harness.step._cache_size()
    admissions = harness.set_slot._cache_size()
    rng = np.random.default_rng(0)
    for position in range(8):
        chosen = rng.permutation(len(MIX))[: rng.integers(1, len(MIX) + 1)]
        slots = rng.permutation(16)[: len(chosen)]
        for slot, i in zip(slots, chosen, strict=True):
            batch.put(int(slot), MIX[i])
        batch.step(logits_of(position, rows=len(chosen)), slots, [position] * len(chosen))
    assert len(harness.traces) == start
    assert harness.step._cache_size() == size
    assert harness.set_slot._cache_size() <= admissions + 1


def test_bad_logits_fail_their_row_only():
    logits = logits_of(4, rows=9)
    logits[1, 50] = np.nan
    logits[2, 50] = np.inf
    logits[3, :] = -np.inf
    logits[4, 10:] = -np.inf
    logits[5, 100] = np.nan
    logits[7, 0] = np.nan
    rows = [Row(SamplingParams(), i) for i in range(5)] + [Row(SamplingParams(temperature=0)) for _ in range(2)]
    rows += [Row(SamplingParams(top_k=5, top_p=0.5, min_p=0.1, typical_p=0.5, presence_penalty=1.0)) for _ in range(2)]
    output = sample_rows(logits, rows)
    assert output.invalid.tolist() == [False, True, True, True, False, True, False, True, False]
    assert output.token_ids[[1, 2, 3, 5, 7]].tolist() == [0] * 5
    clean = sample_rows(logits_of(4, rows=9), rows)
    assert output.token_ids[[0, 6, 8]].tolist() == clean.token_ids[[0, 6, 8]].tolist()
    assert output.token_ids[4] < 10


def test_a_nan_under_a_mask_is_still_reported():
    logits = logits_of(4, rows=2)
    logits[:, 5] = np.nan
    rows = [
        Row(SamplingParams(temperature=0, banned_token_ids=[5])),
        Row(SamplingParams(temperature=0, min_tokens=3), stop_token_ids=[5]),
    ]
    assert sample_rows(logits, rows).invalid.all()


def test_edges():
    logits = logits_of(6, rows=8)
    logits[7] = 0.0
    logits[7, 20:24] = 5.0
    rows = [
        Row(SamplingParams(top_k=10 * V)),
        Row(SamplingParams(allowed_token_ids=[77], top_p=0.5, temperature=5.0)),
        Row(SamplingParams(banned_token_ids=[i for i in range(V) if i != 31], min_p=1.0)),
        Row(SamplingParams(temperature=1e-4)),
        Row(SamplingParams(temperature=1e-30, top_k=5)),
        Row(SamplingParams(top_k=1)),
        Row(SamplingParams(top_p=1e-6)),
        Row(SamplingParams(top_k=2, temperature=100.0)),
    ]
    tokens = sample_rows(logits, rows).token_ids.tolist()
    plain = sample_rows(logits, [Row(SamplingParams()), *rows[1:]]).token_ids.tolist()
    best = np.argmax(logits, -1).tolist()
    assert tokens[0] == plain[0]
    assert tokens[1:3] == [77, 31]
    assert tokens[3:7] == best[3:7]
    tied = draw_many(logits[7], samples(rows[7].params, 512))
    assert set(tied.tolist()) == {20, 21, 22, 23}, "ties with the k-th largest stay"


def test_a_vocabulary_smaller_than_a_group():
    rows = [Row(SamplingParams(temperature=100.0), seed) for seed in range(15)] + [Row(SamplingParams(temperature=0))]
    tokens = sample_rows(logits_of(9, rows=16, vocab_size=20), rows).token_ids
    assert tokens.max() < 20
    assert len(set(tokens.tolist())) > 6
    assert tokens[15] == np.argmax(logits_of(9, rows=16, vocab_size=20)[15])


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros((3, V), np.float32)
    logits[1, [40, 140]] = 1.0
    logits[2, V - 1] = 1.0
    assert sample_rows(logits, [Row(SamplingParams(temperature=0))] * 3).token_ids.tolist() == [0, 40, V - 1]


def test_padding_rows_write_to_the_spare_slot():
    batch = Batch(V)
    batch.put(1, Row(SamplingParams(temperature=0, presence_penalty=0.1)))
    before = np.asarray(batch.state.counts).copy()
    token = batch.step(logits_of(2), [1], [0]).token_ids[0]
    after = np.asarray(batch.state.counts)
    changed = np.argwhere((after != before).reshape(len(after), -1))
    assert changed.tolist() == [[1, int(token)]]
    assert np.asarray(batch.state.last_tokens)[:4].tolist() == [0, int(token), 0, 0]
