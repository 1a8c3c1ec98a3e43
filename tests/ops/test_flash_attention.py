"""Flash attention's backends against the oracle; the TPU kernel simulated, with races raising."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.ops.flash_attention import BACKENDS, FlashCase, attend, choose_backend
from pallas_kernels.flash_attention import backward, reference, tpu, xla
from pallas_kernels.flash_attention.cases import CASES
from pallas_kernels.flash_attention.tpu import Blocks
from tests.ops.flash import oracle
from tests.sharding.run_on_devices import run_on_devices

CASE = FlashCase(4, 2, 8, 8, 0.35, dtype="float32")
INTERPRET = pltpu.InterpretParams(detect_races=True)
SMALL = Blocks(16, 128, 1 << 24)


@dataclass(frozen=True)
class Problem:
    """Shapes and values of one call."""

    case: FlashCase
    batch: int
    num_queries: int
    num_keys: int
    q_start: int
    kv_start: int
    seed: int

    def arrays(self) -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray] | None]:
        """q, k and v as the case's dtype holds them, NaN past the last position that a query sees; segments."""
        rng, case = np.random.default_rng(self.seed), self.case
        shapes = [
            (self.batch, self.num_queries, case.num_heads, case.head_dim),
            (self.batch, self.num_keys, case.num_kv_heads, case.head_dim),
            (self.batch, self.num_keys, case.num_kv_heads, case.value_dim),
        ]
        arrays = [np.array(jnp.asarray(rng.normal(size=shape), case.dtype), np.float32) for shape in shapes]
        if case.causal:
            unseen = max(self.q_start + self.num_queries - self.kv_start, 0)
            for array in arrays[1:]:
                array[:, unseen:] = np.nan
        if not case.has_segments:
            return arrays, None
        segments = [
            np.sort(rng.integers(0, 3, (self.batch, n))).astype(np.int32) for n in (self.num_queries, self.num_keys)
        ]
        return arrays, (segments[0], segments[1])


@functools.cache
def compiled(run: Callable[..., Any], case: FlashCase, **options: Any) -> Callable[..., Any]:
    def call(arrays: Any, q_start: Any, kv_start: Any, segments: Any) -> Any:
        return run(case, *arrays, q_start=q_start, kv_start=kv_start, segments=segments, **options)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


def check(problem: Problem, run: Callable[..., Any], **options: Any) -> None:
    arrays, segments = problem.arrays()
    expected, expected_lse = oracle(problem.case, *arrays, problem.q_start, problem.kv_start, segments)
    call = compiled(run, problem.case, **options)
    given_arrays = [jnp.asarray(array, problem.case.dtype) for array in arrays]
    out, lse = call(given_arrays, problem.q_start, problem.kv_start, segments)
    tolerance = 2e-5 if problem.case.dtype == "float32" else 3e-2
    assert (out.dtype, lse.dtype) == (given_arrays[0].dtype, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, atol=tolerance, rtol=tolerance)


@st.composite
def problems(draw: st.DrawFn, *, lengths: tuple[int, ...]) -> Problem:
    """Any case, with parts of a context that may lie before, across or after one another."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    causal = draw(st.booleans())
    case = replace(
        CASE,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        value_dim=draw(st.sampled_from([8, 5])),
        causal=causal,
        window=draw(st.sampled_from([None, 1, 9, 40])) if causal else None,
        soft_cap=draw(st.sampled_from([None, 2.0])),
        has_segments=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )
    some = st.sampled_from(lengths)
    starts = st.sampled_from([0, 0, 7, 50])
    seed = draw(st.integers(0, 2**16))
    return Problem(case, draw(st.integers(1, 2)), draw(some), draw(some), draw(starts), draw(starts), seed)


@settings(max_examples=15, deadline=None)
@given(problem=problems(lengths=(1, 13, 40)))
def test_reference_matches_oracle(problem: Problem) -> None:
    check(problem, reference.flash_attention)


@pytest.mark.parametrize(("block_queries", "block_keys"), [(8, 16), (16, 8)])
def test_xla_matches_oracle(monkeypatch: pytest.MonkeyPatch, block_queries: int, block_keys: int) -> None:
    """Blocks far smaller than the sequences, and of no length that divides them."""
    monkeypatch.setattr(xla, "BLOCK_QUERIES", block_queries)
    monkeypatch.setattr(xla, "BLOCK_KEYS", block_keys)
    compiled.cache_clear()

    @settings(max_examples=15, deadline=None)
    @given(problem=problems(lengths=(1, 13, 40)))
    def holds(problem: Problem) -> None:
        check(problem, xla.flash_attention)

    holds()
    compiled.cache_clear()


def test_xla_never_holds_all_logits() -> None:
    """A context of 16k: all logits are 1 GiB a head, the program's temporaries a hundredth of that."""
    case = replace(CASE, num_heads=1, num_kv_heads=1)
    array = jax.ShapeDtypeStruct((1, 16384, 1, 8), jnp.float32)
    program = jax.jit(functools.partial(xla.flash_attention, case)).lower(array, array, array).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**30 // 100


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(problem=problems(lengths=(1, 20, 300)))
def test_tpu_matches_oracle_and_races_nowhere(problem: Problem) -> None:
    check(problem, tpu.flash_attention, blocks=SMALL, interpret=INTERPRET)


@pytest.mark.parametrize(
    ("changes", "num_queries", "num_keys", "starts"),
    [
        ({}, 40, 300, (260, 0)),
        ({"window": 60, "soft_cap": 2.0}, 33, 390, (350, 0)),
        ({"causal": False, "has_segments": True, "dtype": "bfloat16"}, 20, 140, (0, 0)),
        ({}, 20, 140, (0, 500)),
    ],
    ids=["causal", "window", "segments", "nothing seen"],
)
def test_tpu_kinds(changes: dict[str, Any], num_queries: int, num_keys: int, starts: tuple[int, int]) -> None:
    problem = Problem(replace(CASE, **changes), 1, num_queries, num_keys, *starts, seed=3)
    check(problem, tpu.flash_attention, blocks=SMALL, interpret=INTERPRET)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 5}, "5 query heads are no multiple of 2 kv heads"),
        ({"window": 0}, "window 0 is less than 1"),
        ({"window": 4, "causal": False}, "a window needs causal attention"),
        ({"soft_cap": 0.0}, "soft cap 0.0 is not above 0"),
        ({"value_dim": 0}, "head dims 8 and 0 must be at least 1"),
    ],
)
def test_unsound_cases_are_refused_by_all(changes: dict[str, Any], reason: str) -> None:
    case = replace(CASE, **changes)
    for backend in BACKENDS:
        assert backend.supports(case) == reason
    with pytest.raises(ValueError, match=reason):
        choose_backend(case, "tpu")
    with pytest.raises(ValueError, match=reason):
        xla.flash_attention(case, *(jnp.zeros((1, 4, 2, 8)),) * 3)


def test_choice_and_refusals() -> None:
    assert choose_backend(CASE, "tpu")[0].name == "pallas_tpu"
    backend, refusals = choose_backend(CASE, "cpu")
    assert backend.name == "xla"
    assert refusals == {"pallas_tpu": "the platform is cpu, not tpu", "pallas_gpu": "the platform is cpu, not gpu"}
    assert choose_backend(replace(CASE, dtype="float16"), "tpu")[1] == {
        "pallas_tpu": "dtype float16 is not one of float32, bfloat16",
        "pallas_gpu": "the platform is tpu, not gpu",
    }
    assert choose_backend(replace(CASE, head_dim=320), "tpu")[1]["pallas_tpu"].startswith("head dims 320 and 8 are not")
    assert "1024 query heads of a kv head need" in str(tpu.supports(replace(CASE, num_heads=1024, num_kv_heads=1)))
    assert choose_backend(CASE, "cpu", forced="reference")[0].name == "reference"
    with pytest.raises(ValueError, match="'cudnn' is unknown; choose one of: pallas_tpu, pallas_gpu, xla, reference"):
        choose_backend(CASE, "cpu", forced="cudnn")
    with pytest.raises(ValueError, match="the platform is cpu, not tpu"):
        choose_backend(CASE, "cpu", forced="pallas_tpu")


@pytest.mark.parametrize("run", [reference.flash_attention, xla.flash_attention, tpu.flash_attention])
def test_wrong_arguments_are_refused(run: Callable[..., Any]) -> None:
    q, k = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 9, 2, 8))
    with pytest.raises(ValueError, match=r"v has shape \(2, 8, 2, 8\); this case needs \(2, 9, 2, 8\)"):
        run(CASE, q, k, k[:, :8])
    with pytest.raises(ValueError, match=r"k has shape \(2, 9, 1, 8\)"):
        run(CASE, q, k[:, :, :1], k)
    with pytest.raises(ValueError, match="k is of bfloat16; this case needs float32"):
        run(CASE, q, k.astype(jnp.bfloat16), k)
    with pytest.raises(ValueError, match="has_segments=True, but segments are missing"):
        run(replace(CASE, has_segments=True), q, k, k)
    with pytest.raises(ValueError, match=r"segments of keys has shape \(2, 5\); this case needs \(2, 9\)"):
        run(replace(CASE, has_segments=True), q, k, k, segments=(jnp.zeros((2, 5)), jnp.zeros((2, 5))))
    with pytest.raises(ValueError, match="0 queries and 9 keys"):
        run(CASE, q[:, :0], k, k)


def test_real_models_fit_every_chip() -> None:
    for name, case in CASES.items():
        assert tpu.supports(case) is None, name
        for num_tokens in (1, 100, 16384):
            blocks = tpu.choose_blocks(case, num_tokens, num_tokens, "a chip nobody tuned")
            assert tpu._vmem_bytes(case, blocks.queries, blocks.keys) <= blocks.vmem_limit_bytes // 2


@pytest.mark.parametrize("changes", [{}, {"window": 9, "soft_cap": 2.0, "value_dim": 5}, {"causal": False}])
def test_gradients_are_the_references(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    for module in (xla, backward):
        monkeypatch.setattr(module, "BLOCK_QUERIES", 8)
        monkeypatch.setattr(module, "BLOCK_KEYS", 16)
    case = replace(CASE, **changes)
    arrays = [jnp.asarray(array) for array in Problem(case, 2, 37, 37, 0, 0, seed=1).arrays()[0]]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))

    def of(run: Callable[..., Any]) -> Any:
        def loss(*arrays: jax.Array) -> jax.Array:
            return sum(jnp.sum(jnp.sin(array)) for array in run(case, *arrays))  # of the log-sum-exp too

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    want = of(reference.flash_attention)
    for a, b in zip(want, of(lambda case, *arrays: attend(case, *arrays, mesh)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_kernel_on_a_mesh() -> None:
    """The TPU kernel, simulated on four devices: heads and sequences where they divide, all of them where not."""
    run_on_devices(
        """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxinfer.ops import flash_attention as op
from jaxinfer.sharding.mesh import make_mesh
from pallas_kernels.flash_attention import reference, tpu
mesh = make_mesh("data=2,tensor=2")
run = functools.partial(tpu.flash_attention, interpret=pltpu.InterpretParams())
kernel = op.Backend("simulated", "cpu", tpu.supports, run)
op.BACKENDS = (kernel, *op.BACKENDS)
for batch, kv_heads in ((2, 2), (3, 1)):
    case = op.FlashCase(4, kv_heads, 8, 8, 0.35, dtype="float32")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, 20, n, 8)), jnp.float32) for n in (4, kv_heads, kv_heads))
    program = jax.jit(lambda *arrays: op.attend(case, *arrays, mesh))
    for got, want in zip(program(q, k, v), reference.flash_attention(case, q, k, v)):
        np.testing.assert_allclose(got, want, atol=1e-5)
""",
        num_devices=4,
    )
