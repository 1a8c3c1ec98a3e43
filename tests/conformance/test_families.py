"""Every family against Hugging Face transformers: logits and greedy tokens of the golden checkpoints (see goldens/).

The forward is the cacheless one; the engine is held to it elsewhere.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.reader import CheckpointReader
from jaxinfer.layers.rope import frequencies
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Model, Params
from jaxinfer.models.registry import ARCHITECTURES, resolve

GOLDENS = sorted(path.parent for path in (Path(__file__).parent / "goldens").glob("*/config.json"))
TOLERANCE = 1e-4


CONTINUATION = 12  # greedy tokens in every golden


def load(directory: Path) -> tuple[Model, Params]:
    family, config = resolve(json.loads((directory / "config.json").read_text()))
    model = Model(config)
    with CheckpointReader(directory) as reader:
        return model, load_params(reader, model.abstract_params, family, config)


def length_classes(config: ModelConfig, lengths: list[int]) -> dict[int, int]:
    """Each length to the least one that is rotated alike: one for all, unless a scaling depends on the length."""
    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    first: dict[tuple[bytes, ...], int] = {}
    return {n: first.setdefault(tuple(frequencies(rope, n)[0].tobytes() for rope in ropes), n) for n in lengths}


@pytest.mark.parametrize("directory", GOLDENS, ids=lambda path: path.name)
def test_logits_and_greedy_tokens_are_those_of_transformers(directory):
    model, params = load(directory)
    golden = np.load(directory / "golden.npz")
    longest = max(golden[f"prompt_{i}"].size for i in (0, 1)) + CONTINUATION - 1
    # One program a golden, compiled fast rather than well: these models are tiny.
    forward = jax.jit(
        model.forward, static_argnames="context_len", compiler_options={"xla_backend_optimization_level": 0}
    )

    for i in (0, 1):
        prompt, greedy = golden[f"prompt_{i}"], golden[f"greedy_{i}"]
        # What follows a token changes nothing before it: one forward answers for the prompt and every greedy step,
        # as long as the rotation does not depend on the step's length.
        tokens = np.zeros(longest, np.int32)
        tokens[: prompt.size + CONTINUATION - 1] = np.concatenate([prompt, greedy[:-1]])
        lengths = list(range(prompt.size, prompt.size + CONTINUATION))
        classes = length_classes(model.config, lengths)
        with jax.default_matmul_precision("highest"):
            logits = {n: np.asarray(forward(params, tokens, context_len=n)) for n in set(classes.values())}
        difference = np.abs(logits[classes[prompt.size]][: prompt.size] - golden[f"logits_{i}"])
        assert difference.max() < TOLERANCE
        steps = [int(np.argmax(logits[classes[n]][n - 1])) for n in lengths]
        assert steps == greedy.tolist()


def test_every_architecture_has_a_golden():
    named = {json.loads((path / "config.json").read_text())["architectures"][0] for path in GOLDENS}
    assert named == set(ARCHITECTURES)
