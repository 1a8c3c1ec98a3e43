"""prefill and decode for one's own `jit` give what the cacheless forward gives: on one device and on meshes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.loading import LoadedModel, load_model
from tests.e2e.harness import GOLDENS, TOLERANCE, VOCAB_SIZE
from tests.sharding.run_on_devices import run_on_devices

ROOT = Path(__file__).parents[2]
NUM_SEQUENCES, MAX_LEN, CHUNK = 8, 40, 12
FAST = {"xla_backend_optimization_level": 0}  # compiled fast rather than well: these models are tiny


class Caller:
    """A caller with programs of its own, and the tokens of each sequence so far."""

    def __init__(self, loaded: LoadedModel, params: Any) -> None:
        self.loaded, self.params = loaded, params
        self.rng = np.random.default_rng(0)
        self.cache = loaded.make_cache(NUM_SEQUENCES, MAX_LEN, max_prefill_len=CHUNK, page_size=4)
        self.sequences: list[list[int]] = [[] for _ in range(NUM_SEQUENCES)]
        self.seen: list[tuple[int, int, np.ndarray]] = []  # row, length, and the logits after so many tokens
        shardings = (loaded.shardings, loaded.cache_shardings(self.cache), loaded.sequence_sharding)
        self._prefill = jax.jit(
            loaded.prefill,
            in_shardings=(*shardings, loaded.sequence_sharding),
            donate_argnums=1,
            compiler_options=FAST,
        )
        self._decode = jax.jit(self._decode_all, donate_argnums=1, compiler_options=FAST)
        self._forward = jax.jit(loaded.forward, compiler_options=FAST)

    def _decode_all(self, params: Any, cache: Any, tokens: jax.Array) -> Any:
        def one(cache: Any, token: jax.Array) -> Any:
            logits, cache = self.loaded.decode(params, cache, token)
            return cache, logits

        return jax.lax.scan(one, cache, tokens)

    def prefill(self, *lengths: int) -> None:
        tokens = self.rng.integers(3, VOCAB_SIZE, (NUM_SEQUENCES, CHUNK), dtype=np.int32)
        before = self.cache
        logits, self.cache = self._prefill(self.params, before, tokens, np.array(lengths, np.int32))
        assert all(pool.is_deleted() for pool in before.pools), "the donated cache was copied"
        logits = np.asarray(logits)
        for row, length in enumerate(lengths):
            fits = 0 < length <= min(CHUNK, MAX_LEN - len(self.sequences[row]))
            assert np.isnan(logits[row]).any() != fits
            if fits:
                self.sequences[row] += tokens[row, :length].tolist()
                self.seen.append((row, len(self.sequences[row]), logits[row]))

    def decode(self, steps: int) -> None:
        tokens = self.rng.integers(3, VOCAB_SIZE, (steps, NUM_SEQUENCES), dtype=np.int32)
        self.cache, stacked = self._decode(self.params, self.cache, tokens)
        logits = np.asarray(stacked)
        for step in range(steps):
            for row, sequence in enumerate(self.sequences):
                sequence.append(int(tokens[step, row]))
                self.seen.append((row, len(sequence), logits[step, row]))

    def check(self) -> None:
        """All logits so far, and the lengths."""
        assert self.cache.lengths.tolist() == [len(sequence) for sequence in self.sequences]
        padded = np.zeros((NUM_SEQUENCES, MAX_LEN), np.int32)
        for row, sequence in enumerate(self.sequences):
            padded[row, : len(sequence)] = sequence
        expected = np.asarray(self._forward(self.params, padded))
        assert self.seen
        for row, length, logits in self.seen:
            np.testing.assert_allclose(logits, expected[row, length - 1], rtol=0, atol=TOLERANCE)
        self.seen = []

    def forget(self, *counts: int) -> None:
        self.cache = replace(self.cache, lengths=self.cache.lengths - np.array(counts, np.int32))
        self.sequences = [row[: len(row) - count] for row, count in zip(self.sequences, counts, strict=True)]


def check(loaded: LoadedModel, params: Any = None) -> Caller:
    caller = Caller(loaded, loaded.params if params is None else params)
    caller.prefill(1, 5, 12, 0, 2, 1, 12, 3)
    caller.prefill(12, 1, 11, 3, 0, 1, 0, 7)  # appended; some are left as they were
    caller.decode(14)
    caller.prefill(3, 4, 5, 13, -1, 12, 0, 1)  # too many for what is left, or for T: nothing happens to those
    caller.check()
    caller.forget(0, 3, 12, 0, 1, 7, 0, 0)
    caller.prefill(1, 1, 1, 1, 12, 12, 2, 0)
    caller.check()
    return caller


@pytest.mark.parametrize("golden", ["gemma2", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_equals_forward(golden: str) -> None:
    """Rings and soft caps; one latent for all heads, and experts."""
    loaded = load_model(GOLDENS / golden)
    caller = check(loaded)
    if golden == "gemma2":
        ring, full = (loaded.make_cache(8, MAX_LEN, max_prefill_len=n, page_size=4).pools for n in (CHUNK, MAX_LEN))
        smaller = [a.size < b.size for a, b in zip(ring, full, strict=True)]
        assert smaller == [layer.window is not None for layer in loaded.config.layers]
        assert [pool.shape for pool in caller.cache.pools] == [pool.shape for pool in ring]


def test_eight_bits() -> None:
    """A prompt in parts and at once gives the same; what the forward gives is close. The cache is a pytree of both."""
    loaded, tokens = load_model(GOLDENS / "llama3_gqa"), np.arange(4, 28, dtype=np.int32).reshape(2, 12)
    prefill, full = jax.jit(loaded.prefill, compiler_options=FAST), np.full(2, 12, np.int32)
    cache = loaded.make_cache(2, MAX_LEN, max_prefill_len=12, page_size=4, kv_cache_dtype="int8")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.pools)} == {"int8", "float32"}
    at_once, _ = prefill(loaded.params, cache, tokens, full)
    _, cache = prefill(loaded.params, cache, tokens, full - 5)
    in_parts, cache = prefill(loaded.params, cache, np.roll(tokens, -7, axis=1), full - 7)
    np.testing.assert_allclose(in_parts, at_once, atol=0.01)
    assert 0 < np.abs(at_once - loaded.forward(loaded.params, tokens)[:, -1]).max() < 0.3
    assert loaded.make_cache(2, MAX_LEN, kv_cache_dtype="fp8").page_size == 32


def test_other_parameters_and_gradients() -> None:
    loaded = load_model(GOLDENS / "llama3_gqa")
    caller = Caller(loaded, loaded.params)
    caller.prefill(*range(1, 9))
    caller.params = jax.tree.map(lambda leaf: leaf * np.float32(1.1), loaded.params)
    caller.forget(*range(1, 9))
    caller.seen = []  # of parameters that are no more
    caller.prefill(*range(5, 13))
    caller.check()
    gradient = jax.jit(
        jax.grad(lambda params: loaded.forward(params, jnp.arange(9)).var()),
        compiler_options=FAST,
    )(loaded.params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["layers"]["0"]))


@pytest.mark.parametrize(
    ("golden", "axes"),
    [
        ("llama3_gqa", ("data", "fsdp", "tensor")),
        pytest.param("qwen3_moe_windows", ("expert", "context", "data"), marks=pytest.mark.slow),
    ],
)
def test_on_meshes(golden: str, axes: tuple[str, ...]) -> None:
    """Own programs on 8 devices, the mesh given by jax: dense over three axes, experts over two others."""
    code = f"""
import jax
from jaxinfer.loading import load_model
from tests.runner.test_functional import GOLDENS, check
loaded = load_model(GOLDENS / {golden!r}, mesh=jax.make_mesh((2, 2, 2), {axes}))
caller = check(loaded)
for array, sharding in zip(
    jax.tree.leaves(caller.cache), jax.tree.leaves(loaded.cache_shardings(caller.cache)), strict=True
):
    assert array.sharding.is_equivalent_to(sharding, array.ndim), (array.sharding, sharding)
    assert len({{str(shard.index) for shard in array.addressable_shards}}) == (8 if array.ndim > 1 else 4)
try:
    loaded.make_cache(6, 40)
except ValueError as error:
    print(error)
"""
    (line,) = run_on_devices(code, 8).splitlines()
    assert re.match(r"num_sequences=6 is not a multiple of the 4 shards of mesh .*; use 8$", line)


def test_refusals() -> None:
    loaded = load_model(GOLDENS / "gpt_bigcode_mqa")
    cache = jax.eval_shape(lambda: loaded.make_cache(2, 32, max_prefill_len=8))
    tokens, lengths = np.zeros((2, 8), np.int32), np.ones(2, np.int32)
    for call, message in (
        (lambda: loaded.make_cache(0, 32), r"num_sequences=0 must be a whole number of at least 1"),
        (lambda: loaded.make_cache(2, 3.5), r"max_len=3.5 must be a whole number"),  # pyright: ignore[reportArgumentType]
        (lambda: loaded.make_cache(2, 4096), r"max_len=4096 is more than the \d+ positions this model has learned"),
        (lambda: loaded.make_cache(2, 32, attention_backend="none"), r"'none' is unknown; choose one of"),
        (
            lambda: loaded.prefill(loaded.params, cache, tokens[:1], lengths),
            r"tokens has shape \(1, 8\); give \[2, T\]",
        ),
        (lambda: loaded.prefill(loaded.params, cache, tokens, lengths[:1]), r"lengths has shape \(1,\); give \[2\]"),
        (lambda: loaded.prefill(loaded.params, cache, tokens + 0.5, lengths), r"tokens has dtype float32; give int"),
        (
            lambda: loaded.prefill(loaded.params, cache, np.zeros((2, 9), np.int32), lengths),
            r"tokens has 9 tokens for each sequence, and the cache is made for 8 at once; give them in several calls",
        ),
        (lambda: loaded.decode(loaded.params, cache, tokens), r"tokens has shape \(2, 8\); give \[S\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_the_example_runs() -> None:
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    result = subprocess.run(
        [sys.executable, "examples/sharded_model.py"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "def mean(values):" in result.stdout
