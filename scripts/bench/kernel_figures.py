"""Times the attention kernels on whatever accelerator jax finds, against what its memory and its matrix units do.

First, in this process: the bandwidth of a copy (bytes read and bytes written) and the rate of a bfloat16 matmul. Then
every backend that serves a case, with random normal inputs: a step of decodes as a share of that bandwidth, also with a
cache of 8 bits, and the prefill of a long prompt in TFLOP/s, on GPUs beside that of cuDNN. Some rows of every result
are checked against the reference.

How it is timed: the calls run one after another inside one program, each on the output and the page pool of the one
before, and the time of many less that of few is divided by how many more they are, so that what the host and the launch
take is not in it. A profiler's trace would leave out the loop's own few microseconds too, but needs rights on the GPU's
counters that containers often lack, and is another format on every platform. A decode's calls take pages from so many
sets in turn that those of one have left the cache before they are read again; where memory is too small for that, the
line says so.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.metrics.table import format_seconds
from jaxinfer.ops import flash_attention, paged_attention
from jaxinfer.ops.flash_attention import FlashCase
from jaxinfer.ops.paged_attention import AttentionCase, RaggedBatch
from jaxinfer.runner.batch import DeviceBatch
from pallas_kernels.flash_attention.reference import flash_attention as flash_reference
from pallas_kernels.paged_attention.quantized import QuantizedPool
from pallas_kernels.paged_attention.reference import paged_attention as paged_reference
from pallas_kernels.paged_attention.tpu_layout import PIECE, Layout

_MAX_SETS = 32  # of pages that calls take in turn: one program holds so many calls
_STEPS = 40  # of 8-bit numbers to a standard deviation
_CHECKED = 32  # queries at either end of a prompt that are held to the reference


@dataclass(frozen=True)
class Sizes:
    """What is timed. cache: bytes, more than the chip's last cache holds; seconds: what is timed takes so long, unless
    that were more than so many calls."""

    dtype: str
    copy_bytes: int
    matmul: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    page_sizes: tuple[int, ...]
    kv_dtypes: tuple[str, ...]
    heads: tuple[tuple[str, int, int], ...]
    head_dim: int
    prompt: int
    cache: int
    seconds: float
    calls: int


_HEADS = (("GQA 8", 64, 8), ("MQA", 48, 1))
_FULL = Sizes(
    dtype="bfloat16",
    copy_bytes=2**30,
    matmul=8192,
    batches=(1, 8, 32, 128, 256),
    contexts=(1024, 8192, 32768, 131072),
    page_sizes=(16, 32, 64),
    kv_dtypes=("int8", "float8_e4m3fn"),
    heads=_HEADS,
    head_dim=128,
    prompt=16384,
    cache=2**27,
    seconds=0.1,
    calls=2**14,
)
_QUICK = replace(_FULL, batches=(1, 32), contexts=(1024, 8192), page_sizes=(32,), seconds=0.03)
_CPU = Sizes("float32", 2**20, 64, (2,), (40,), (8,), ("int8",), (("GQA 2", 4, 2),), 8, 48, 1, 0.001, 4)


def seconds_of(step: Callable[[Any, Any], Any], state: Any, fixed: Any, sizes: Sizes) -> float:
    """Seconds of one `step(state, fixed)` of many in a row. `state` is given away."""

    def times(count: int) -> Callable[[Any], tuple[float, Any]]:
        def run(state: Any, fixed: Any) -> Any:
            return lax.fori_loop(0, count, lambda _, state: step(state, fixed), state)

        program = jax.jit(run, donate_argnums=0).lower(state, fixed).compile()

        def timed(state: Any) -> tuple[float, Any]:
            started = time.perf_counter()
            state = jax.block_until_ready(program(state, fixed))
            return time.perf_counter() - started, state

        return timed

    few, count = times(1), 4
    _, state = few(jax.block_until_ready(state))
    while True:
        many, found = times(1 + count), []
        _, state = many(state)
        for _ in range(5):
            short, state = few(state)
            long, state = many(state)
            found.append(long - short)
        taken = statistics.median(found)
        if taken >= sizes.seconds or count >= sizes.calls:
            return max(taken / count, 1e-9)
        count = min(int(count * 1.3 * sizes.seconds / max(taken, sizes.seconds / 64)) + 1, sizes.calls)


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes read and written in a second."""
    numbers = jnp.zeros(sizes.copy_bytes // 4, jnp.int32)
    # The barrier keeps a compiler that unrolls the loop from passing over the numbers once for several turns.
    taken = seconds_of(lambda x, _: lax.optimization_barrier(x + 1), numbers, None, sizes)
    return 2 * numbers.nbytes / taken


def matmul_rate(sizes: Sizes) -> float:
    """Operations in a second of square matrices of normal numbers."""
    n = sizes.matmul
    x, w = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(sizes.dtype)) for i in range(2))
    taken = seconds_of(lambda x, w: x @ w, x, w * n**-0.5, sizes)
    return 2 * n**3 / taken


@dataclass(frozen=True)
class Line:
    """One result: what, by whom, seconds of one call (None: refused), the figure, and what is to be said of it."""

    what: str
    backend: str
    seconds: float | None
    figure: str
    share: float | None
    note: str = ""
    wrong: bool = False

    def __str__(self) -> str:
        taken = "" if self.seconds is None else format_seconds(self.seconds)
        share = "" if self.share is None else f"{self.share:.0%}"
        return f"{self.what:<44} {self.backend:<11} {taken:>9} {self.figure:>14} {share:>6}  {self.note}".rstrip()


def attempt(what: str, backend: str, run: Callable[[], Line]) -> Line:
    """A line, also where a kernel fails: the others are still timed."""
    try:
        return run()
    except Exception as error:
        return Line(what, backend, None, "", None, f"FAILED {type(error).__name__}: {str(error)[:200]}", wrong=True)


# Decode.


def _memory() -> int:
    """Bytes of the device that pools may take: a third, since they are made from temporaries of some size."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 2**33) // 3


def _batch(kv_len: np.ndarray, new: np.ndarray, table: np.ndarray) -> DeviceBatch:
    """Rows of new[s] tokens each, the newest of kv_len[s]; nothing is padded."""
    starts = np.concatenate([[0], np.cumsum(new)])
    positions = np.concatenate([np.arange(length - n, length) for length, n in zip(kv_len, new, strict=True)])
    integers = functools.partial(jnp.asarray, dtype=jnp.int32)
    return DeviceBatch(
        tokens=integers(np.zeros(starts[-1])),
        token_slots=integers(np.full(starts[-1], -1)),
        positions=integers(positions),
        sequence_ids=integers(np.repeat(np.arange(len(new)), new)),
        query_start=integers(starts),
        kv_len=integers(kv_len),
        page_tables=(integers(table),),
        logits_tokens=integers(np.zeros(len(new))),
        num_tokens=integers(starts[-1]),
        num_sequences=integers(len(new)),
    )


def _attend(
    backend: paged_attention.Backend, case: AttentionCase, state: tuple[jax.Array, Any], fixed: Any
) -> tuple[jax.Array, Any]:
    """One call for every set of pages, each on the output of the one before."""
    q, pool = state
    k, v, sets = fixed
    for batch, metadata in sets:
        out, pool = backend.run(case, q, k, v, pool, batch, 0, metadata)
        q = out.astype(q.dtype)
    return q, pool


def _to_reference(backend: str, case: AttentionCase, pages: Any) -> Any:
    """Pages of a backend's pool -> [pages, 2, K, B, H]; of a quantized pool scales [pages, 2, K, B] too."""
    if isinstance(pages, QuantizedPool):
        return QuantizedPool(
            _to_reference(backend, case, pages.data), _scales_to_reference(backend, case, pages.scales)
        )
    if backend != "pallas_tpu":  # heads by themselves or joined with other axes, and what pads them
        return pages.reshape(len(pages), 2, case.num_kv_heads, case.page_size, -1)[..., : case.head_dim]
    start = Layout.of(case).value_start
    return jnp.stack([pages[..., : case.head_dim], pages[..., start : start + case.head_dim]], axis=1)


def _scales_to_reference(backend: str, case: AttentionCase, scales: jax.Array) -> jax.Array:
    if backend != "pallas_tpu":
        return scales.reshape(len(scales), 2, case.num_kv_heads, case.page_size)
    pages, tiles, size = len(scales), case.page_size // PIECE, 2 * case.num_kv_heads * PIECE
    by_tile = scales.reshape(pages, tiles, -1)[..., :size].reshape(pages, tiles, case.num_kv_heads, 2, PIECE)
    return by_tile.transpose(0, 3, 2, 1, 4).reshape(pages, 2, case.num_kv_heads, case.page_size)


def _random_pool(key: jax.Array, page: Any, num_pages: int) -> Any:
    """Normal numbers; 8-bit ones with scales that differ by up to three times."""

    def leaf(number: int, like: jax.ShapeDtypeStruct) -> jax.Array:
        own, shape = jax.random.fold_in(key, number), (num_pages, *like.shape[1:])
        if number == 1:
            return jax.random.uniform(own, shape, like.dtype, 0.5, 1.5) / _STEPS
        numbers = jax.random.normal(own, shape, jnp.bfloat16 if like.dtype.itemsize == 1 else like.dtype)
        return jnp.clip(numbers * _STEPS, -127, 127).astype(like.dtype) if like.dtype.itemsize == 1 else numbers

    leaves, treedef = jax.tree.flatten(page)
    return jax.jit(lambda: treedef.unflatten(list(itertools.starmap(leaf, enumerate(leaves)))))()


def _num_bytes(arrays: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _paged_error(
    backend: str, case: AttentionCase, q: jax.Array, out: jax.Array, pool: Any, batch: RaggedBatch, row: int
) -> float:
    """How far a row's last queries are from the reference, once its keys are in the pool."""
    starts = np.asarray(batch.query_start)
    count = min(int(starts[row + 1] - starts[row]), _CHECKED)
    own = slice(int(starts[row + 1]) - count, int(starts[row + 1]))

    @jax.jit
    def error(q: jax.Array, out: jax.Array, pool: Any, table: jax.Array, length: jax.Array) -> jax.Array:
        pages = _to_reference(backend, case, jax.tree.map(lambda leaf: leaf[table], pool))
        own_table = jnp.arange(table.shape[0])[None]
        expected, _ = paged_reference(
            q.astype(jnp.float32), None, None, pages, own_table, jnp.array([0, count]), length[None], scale=case.scale
        )
        return _relative(out, expected)

    return float(error(q[own], out[own], pool, batch.page_tables[0][row], batch.kv_len[row]))


def _time_paged(
    backend: paged_attention.Backend, case: AttentionCase, kv_len: np.ndarray, new: np.ndarray, sizes: Sizes
) -> tuple[float, float, int]:
    """Seconds of one call, how far it is from the reference, and the sets of pages."""
    width = -(-int(kv_len.max()) // case.page_size)
    page = backend.abstract_pool(case, 1)
    set_bytes = len(kv_len) * width * _num_bytes(page)
    num_sets = max(1, min(-(-2 * sizes.cache // set_bytes), _MAX_SETS, _memory() // set_bytes))
    num_pages = num_sets * len(kv_len) * width + 1
    dtype, keys = jnp.dtype(case.dtype), jax.random.split(jax.random.key(0), 4)
    pool = _random_pool(keys[0], page, num_pages)
    tokens = int(new.sum())
    q = jax.random.normal(keys[1], (tokens, case.num_heads, case.head_dim), dtype)
    k, v = (jax.random.normal(key, (tokens, case.num_kv_heads, case.head_dim), dtype) for key in keys[2:])
    tables = 1 + np.random.default_rng(0).permutation(num_pages - 1).reshape(num_sets, len(kv_len), width)
    batches = [_batch(kv_len, new, table) for table in tables]
    prepare = jax.jit(functools.partial(backend.prepare, case), static_argnums=1)
    sets = [(batch, prepare(batch, 0)) for batch in batches]
    once = jax.jit(functools.partial(_attend, backend, case), donate_argnums=0)
    out, pool = once((jnp.copy(q), pool), (k, v, sets[:1]))
    rows = {0, len(kv_len) - 1}
    error = max(_paged_error(backend.name, case, q, out, pool, batches[0], row) for row in rows)
    taken = seconds_of(functools.partial(_attend, backend, case), (q, pool), (k, v, sets), sizes)
    return taken / num_sets, error, num_sets


def _case(
    sizes: Sizes, platform: str, num_heads: int, num_kv_heads: int, page_size: int, kv_dtype: str | None = None
) -> AttentionCase:
    return AttentionCase(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=sizes.head_dim,
        page_size=page_size,
        window=None,
        soft_cap=None,
        scale=sizes.head_dim**-0.5,
        dtype=sizes.dtype,
        has_sinks=False,
        platform=platform,
        kv_dtype=kv_dtype,
    )


def _relative(out: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest difference, over the largest number of these queries: those of long contexts are small."""
    difference = jnp.abs(out.astype(jnp.float32) - expected.astype(jnp.float32))
    return jnp.max(difference) / jnp.max(jnp.abs(expected.astype(jnp.float32)))


def _verdict(error: float, dtype: str) -> tuple[str, bool]:
    wrong = not error < (1e-4 if dtype == "float32" else 3e-2)
    return (f"WRONG by {error:.1e} of the largest number" if wrong else ""), wrong


def decode_lines(sizes: Sizes, platform: str, bandwidth: float) -> Iterator[Line]:
    for (kind, num_heads, num_kv_heads), page_size in itertools.product(sizes.heads, sizes.page_sizes):
        plain: dict[tuple[str, int, int], float] = {}  # seconds with keys as they are computed
        for kv_dtype in (None, *sizes.kv_dtypes):
            case = _case(sizes, platform, num_heads, num_kv_heads, page_size, kv_dtype)
            name = f"decode, {kind}, pages of {page_size}" + ("" if kv_dtype is None else f", {kv_dtype}")
            for backend in paged_attention.BACKENDS[:-1]:  # all but the reference
                refusal = backend.supports(case)
                if refusal is not None:
                    yield Line(name, backend.name, None, "", None, refusal)
                    continue
                for batch, context in itertools.product(sizes.batches, sizes.contexts):
                    what, key = f"{name}, {batch} x {context}", (backend.name, batch, context)
                    run = functools.partial(_decode_line, what, backend, case, batch, context, sizes, bandwidth)
                    line = attempt(what, backend.name, run)
                    if line.seconds is not None and kv_dtype is None:
                        plain[key] = line.seconds
                    elif line.seconds is not None and key in plain:
                        share = f"{line.seconds / plain[key]:.2f} of the time with {sizes.dtype}"
                        line = replace(line, note=" ".join(filter(None, (line.note, share))))
                    yield line


def _decode_line(
    what: str,
    backend: paged_attention.Backend,
    case: AttentionCase,
    batch: int,
    context: int,
    sizes: Sizes,
    bandwidth: float,
) -> Line:
    vector_bytes = case.head_dim * jnp.dtype(case.kv_dtype or case.dtype).itemsize + (0 if case.kv_dtype is None else 4)
    key_bytes = 2 * batch * context * case.num_kv_heads * vector_bytes
    if key_bytes > _memory():
        return Line(what, backend.name, None, "", None, f"{key_bytes / 2**30:.0f} GiB of keys do not fit")
    lengths = np.full(batch, context)
    taken, error, num_sets = _time_paged(backend, case, lengths, np.ones(batch, np.int64), sizes)
    note, wrong = _verdict(error, case.dtype)
    if num_sets * key_bytes < sizes.cache:
        note = " ".join(filter(None, (note, "its keys stay in the cache")))
    rate = key_bytes / taken
    return Line(what, backend.name, taken, f"{rate / 1e9:.1f} GB/s", rate / bandwidth, note, wrong)


# Prefill.


def prefill_lines(sizes: Sizes, platform: str, rate: float) -> Iterator[Line]:
    kind, num_heads, num_kv_heads = sizes.heads[0]
    tokens, what = sizes.prompt, f"prefill, {kind}, {sizes.prompt} tokens"
    work = 2 * tokens * (tokens + 1) * num_heads * sizes.head_dim  # two products of pairs that are seen

    def line(what: str, name: str, time_it: Callable[[], tuple[float, float]]) -> Line:
        taken, error = time_it()
        note, wrong = _verdict(error, sizes.dtype)
        return Line(what, name, taken, f"{work / taken / 1e12:.3g} TFLOP/s", work / taken / rate, note, wrong)

    def lines(
        form: str, timed: dict[str, Callable[[], tuple[float, float]]], refusals: dict[str, str | None]
    ) -> Iterator[Line]:
        own = f"{what}, {form}"
        for name, time_it in timed.items():
            refusal = refusals[name]
            if refusal is not None:
                yield Line(own, name, None, "", None, refusal)
            else:
                yield attempt(own, name, functools.partial(line, own, name, time_it))

    case = FlashCase(num_heads, num_kv_heads, sizes.head_dim, sizes.head_dim, sizes.head_dim**-0.5, dtype=sizes.dtype)
    shapes = [(1, tokens, heads, sizes.head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    keys = jax.random.split(jax.random.key(1), 3)
    arrays = [jax.random.normal(key, shape, jnp.dtype(sizes.dtype)) for key, shape in zip(keys, shapes, strict=True)]
    runs = {backend.name: backend.run for backend in flash_attention.BACKENDS[:-1]} | {"cudnn": _cudnn}
    refusals = {backend.name: backend.refuses(case, platform) for backend in flash_attention.BACKENDS}
    refusals["cudnn"] = None if platform == "gpu" else f"the platform is {platform}, not gpu"
    timed = {name: functools.partial(_time_flash, run, case, arrays, sizes) for name, run in runs.items()}
    yield from lines("flash", timed, refusals)

    paged_case = _case(sizes, platform, num_heads, num_kv_heads, sizes.page_sizes[0])
    lengths, once = np.array([tokens]), replace(sizes, cache=0)
    backends = {backend.name: backend for backend in paged_attention.BACKENDS[:-1]}
    timed = {
        name: lambda backend=backend: _time_paged(backend, paged_case, lengths, lengths, once)[:2]
        for name, backend in backends.items()
    }
    yield from lines("paged", timed, {name: backend.supports(paged_case) for name, backend in backends.items()})


def _cudnn(case: FlashCase, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    out = jax.nn.dot_product_attention(q, k, v, scale=case.scale, is_causal=True, implementation="cudnn")
    return out, None


def _time_flash(
    attend: Callable[..., Any], case: FlashCase, arrays: list[jax.Array], sizes: Sizes
) -> tuple[float, float]:
    """Seconds of one call, and how far it is from the reference."""
    q, k, v = arrays
    run = functools.partial(attend, case)
    out = jax.jit(lambda q, k, v: run(q, k, v)[0])(q, k, v)
    errors = []
    for first in (0, q.shape[1] - _CHECKED):
        own, seen = slice(first, first + _CHECKED), first + _CHECKED
        reference = jax.jit(functools.partial(flash_reference, case, q_start=first))
        expected, _ = reference(q[:, own], k[:, :seen], v[:, :seen])
        errors.append(float(_relative(out[:, own], expected)))

    def step(q: jax.Array, fixed: Any) -> jax.Array:
        return run(q, *fixed)[0]

    return seconds_of(step, jnp.copy(q), (k, v), sizes), max(errors)


def report(quick: bool, allow_cpu: bool) -> int:
    """Print the table. 1 where a kernel failed or a result is not the reference's."""
    device = jax.devices()[0]
    platform = device.platform
    if platform == "cpu" and not allow_cpu:
        print(
            "jax finds no TPU and no GPU, so there is nothing to time: on this machine the kernels can be simulated "
            "(make test-slow) and compiled (make aot). --allow-cpu runs this script on tiny shapes with XLA's paths."
        )
        return 0
    sizes = _CPU if platform == "cpu" else _QUICK if quick else _FULL
    if platform == "tpu":  # which has no cache before its memory
        sizes = replace(sizes, cache=0)
    print(f"{device.device_kind}, jax {jax.__version__}, {sizes.dtype}, {time.strftime('%Y-%m-%d')}")
    if platform == "cpu":
        print("a CPU: the shapes are tiny, and their times say nothing of any kernel")
    bandwidth, rate = copy_bandwidth(sizes), matmul_rate(sizes)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s read and written; matmul: {rate / 1e12:.3g} TFLOP/s\n")
    print(f"{'':<44} {'backend':<11} {'a call':>9} {'':>14} {'share':>6}")
    lines = []
    for line in itertools.chain(decode_lines(sizes, platform, bandwidth), prefill_lines(sizes, platform, rate)):
        print(line, flush=True)
        lines.append(line)
    print("\nshare: of the copy's bandwidth (decode), of the matmul's rate (prefill)")
    for name in dict.fromkeys(line.backend for line in lines):
        for kind in ("decode", "prefill"):
            found = [line for line in lines if line.backend == name and line.what.startswith(kind)]
            shares = [line.share for line in found if line.share is not None and "cache" not in line.note]
            if shares:
                print(f"{kind} by {name}: median {statistics.median(shares):.0%}, least {min(shares):.0%}")
    wrong = sum(line.wrong for line in lines)
    results = wrong + sum(line.seconds is not None and not line.wrong for line in lines)
    print(f"{wrong} of {results} failed, or are not the reference's")
    return 1 if wrong else 0
