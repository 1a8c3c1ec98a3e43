"""Rotary parameters and frequencies against transformers' (rope_frequencies.json, scripts/make_rope_goldens.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.layers.rope import frequencies
from jaxinfer.models.registry import resolve

CASES = json.loads((Path(__file__).parent / "rope_frequencies.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_frequencies_are_those_of_transformers(case):
    _, config = resolve(case["config"])
    # Layers 0 and 5 of six: with a window and without one, where the two differ.
    rope = config.layers[0 if case["layer_type"] == "sliding_attention" else 5].rope or config.layers[0].rope
    inv_freq, factor = frequencies(rope, case["context_len"])
    assert inv_freq.dtype == np.float32
    assert inv_freq.shape == (rope.rotary_dim // 2,)
    np.testing.assert_allclose(inv_freq, np.float32(case["inv_freq"]), rtol=5e-7)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-7)


def test_dynamic_and_longrope_change_with_the_length_served():
    by_name = {case["name"]: case for case in CASES}
    for short, long in (("dynamic, short", "dynamic, long"), ("longrope, 128", "longrope, 129")):
        assert by_name[short]["inv_freq"] != by_name[long]["inv_freq"]
