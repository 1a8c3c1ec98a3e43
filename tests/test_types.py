"""SamplingParams: what is accepted, what is refused and with which words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxinfer.types import MAX_LOGPROBS, MAX_TOKEN_IDS, SamplingParams, check_against_vocabulary


def test_defaults_are_plain_sampling():
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (1.0, 0, 1.0, 16)
    assert params.stop_strings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", 10**400),
        ("temperature", None),
        ("temperature", 1j),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", -101),
        ("frequency_penalty", 101),
        ("n", 0),
        ("n", 1025),
        ("n", 1.5),
        ("max_tokens", 0),
        ("max_tokens", "16"),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.0),
        ("logprobs", MAX_LOGPROBS + 1),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", MAX_LOGPROBS + 1),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 3),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [5] * (MAX_TOKEN_IDS + 1)),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [True]),
        ("banned_token_ids", ["5"]),
        ("logit_bias", [1, 2]),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {"a": 0.5}),
        ("logit_bias", {"-1": 0.5}),
        ("logit_bias", {"05": 0.5, "5": 0.5}),
        ("logit_bias", {"1" * 5000: 0.5}),
        ("logit_bias", {3: 10**400}),
        ("logit_bias", dict.fromkeys(range(MAX_TOKEN_IDS + 1), 0.5)),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {3: 101.0}),
        ("ignore_eos", 1),
        ("ignore_eos", None),
        ("skip_special_tokens", "yes"),
        ("include_stop_str_in_output", 0),
    ],
)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_the_message_gives_value_and_limit():
    with pytest.raises(ValueError, match=r"^top_p=1.5 is out of range; use a value in \(0, 1\]$"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match=r"^top_k=-7 is out of range; use a value at least -1$"):
        SamplingParams(top_k=-7)


def test_numpy_numbers_become_plain_ones():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(7),
        top_p=np.float64(0.25),
        seed=np.uint32(2**32 - 1),
        max_tokens=np.int32(5),
        ignore_eos=np.bool_(True),
        stop_token_ids=np.arange(3),
        logit_bias={np.int64(4): np.float32(1.5)},
    )
    values = dataclasses.asdict(params)
    assert values["temperature"] == 0.5
    assert values["seed"] == 2**32 - 1
    assert values["stop_token_ids"] == (0, 1, 2)
    assert values["logit_bias"] == {4: 1.5}
    for name in ("temperature", "top_k", "top_p", "seed", "max_tokens", "ignore_eos"):
        assert type(values[name]) in (int, float, bool), name
    assert all(type(token_id) is int for token_id in params.stop_token_ids)


def test_whole_numbers_serve_as_floats_and_minus_one_switches_top_k_off():
    params = SamplingParams(temperature=0, top_p=1, top_k=-1, presence_penalty=-2)
    assert (params.temperature, params.top_p, params.top_k, params.presence_penalty) == (0.0, 1.0, 0, -2.0)


def test_json_spelling_of_logit_bias():
    assert SamplingParams(logit_bias={"50256": -100}).logit_bias == {50256: -100.0}


def test_sequences_are_copied():
    stop, bias = ["a", "b"], {1: 2.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("c")
    bias[7] = 1.0
    assert params.stop == ("a", "b")
    assert params.logit_bias == {1: 2.0}
    assert SamplingParams(stop="x").stop_strings == ("x",)


def test_contradictions():
    with pytest.raises(ValueError, match="min_tokens=17 is greater than max_tokens=16"):
        SamplingParams(min_tokens=17)
    SamplingParams(min_tokens=17, max_tokens=None)
    with pytest.raises(ValueError, match="every one of allowed_token_ids is in banned_token_ids"):
        SamplingParams(allowed_token_ids=[3, 4], banned_token_ids=[4, 3, 9])
    SamplingParams(allowed_token_ids=[3, 4], banned_token_ids=[4])


@pytest.mark.parametrize("name", ["allowed_token_ids", "banned_token_ids", "stop_token_ids"])
def test_token_ids_beyond_the_vocabulary(name):
    check_against_vocabulary(SamplingParams(**{name: [0, 99]}), 100)
    with pytest.raises(ValueError, match=f"{name} holds token id 100, but the model's vocabulary has 100 tokens"):
        check_against_vocabulary(SamplingParams(**{name: [0, 100]}), 100)


def test_logit_bias_beyond_the_vocabulary():
    with pytest.raises(ValueError, match="logit_bias holds token id 100"):
        check_against_vocabulary(SamplingParams(logit_bias={100: 1.0}), 100)


def test_settings_that_leave_no_token():
    with pytest.raises(ValueError, match="leave none of the 3 tokens"):
        check_against_vocabulary(SamplingParams(banned_token_ids=[0, 1, 2]), 3)
    with pytest.raises(ValueError, match="leave none of the 2 tokens"):
        check_against_vocabulary(SamplingParams(min_tokens=1, allowed_token_ids=[5, 6], stop_token_ids=[5]), 9, [6])
    check_against_vocabulary(SamplingParams(allowed_token_ids=[5, 6], stop_token_ids=[5]), 9, [6])
    check_against_vocabulary(
        SamplingParams(min_tokens=1, ignore_eos=True, allowed_token_ids=[5, 6], stop_token_ids=[5]), 9, [6]
    )
    check_against_vocabulary(SamplingParams(banned_token_ids=[0, 1]), 3)
