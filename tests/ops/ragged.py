"""Ragged batches for the attention tests, and an oracle in float64 numpy that shares nothing with the backends."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.ops.paged_attention import AttentionCase, Backend
from jaxinfer.runner.batch import DeviceBatch
from pallas_kernels.paged_attention.quantized import LARGEST, QuantizedPool


def make_case(**changes: object) -> AttentionCase:
    fields = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "page_size": 4,
        "window": None,
        "soft_cap": None,
        "scale": 0.3,
        "dtype": "float32",
        "has_sinks": False,
        "platform": "cpu",
    }
    return AttentionCase(**{**fields, **changes})  # type: ignore[arg-type]


def run_laid_out(backend: Backend, case: AttentionCase, pool: Any, run: Callable[[Any], tuple[Any, Any]]) -> Any:
    """What `run` makes of a pool [pages, 1 or 2, K, B, ...] in the backend's layout: its output, and the pool as given.

    Backends of plain JAX keep the order of these axes and join some of them.
    """
    theirs = backend.abstract_pool(case, jax.tree.leaves(pool)[0].shape[0])
    out, updated = run(jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), pool, theirs))
    return out, jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), updated, pool)


@dataclass
class Ragged:
    """Sequences of cached tokens plus new ones, decodes first, laid out in a shuffled pool full of NaN.

    What no query of the step may see, because it left the window, is NaN too. Where devices share the keys each has a
    pool.

    lengths [(cached, new)]; num_tokens and num_sequences are the padded T and S. A table_width that is less than the
    longest sequence's pages makes the tables rings. shared: of so many rows, the first ones, the first so many tokens,
    whole pages, are the same and in the same pages.
    """

    case: AttentionCase
    lengths: list[tuple[int, int]]
    num_tokens: int
    num_sequences: int
    table_width: int
    seed: int = 0
    shared: tuple[int, int] = (0, 0)
    keys: list[np.ndarray] = field(init=False)
    values: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        case, page = self.case, self.case.context * self.case.page_size
        shape = (case.num_kv_heads, case.head_dim)
        self.keys = [rng.normal(size=(c + n, *shape)).astype(np.float32) for c, n in self.lengths]
        if case.latent_dim is None:
            self.values = [rng.normal(size=(c + n, *shape)).astype(np.float32) for c, n in self.lengths]
        else:
            self.values = [keys[..., : case.latent_dim] for keys in self.keys]
        same, first = self.shared
        for row in range(1, same):
            self.keys[row][:first], self.values[row][:first] = self.keys[0][:first], self.values[0][:first]
        self.queries = [rng.normal(size=(n, case.num_heads, case.head_dim)).astype(np.float32) for _, n in self.lengths]
        self.sinks = rng.normal(size=case.num_heads).astype(np.float32) if case.has_sinks else None
        pages_needed = [-(-(c + n) // page) for c, n in self.lengths]
        width = self.table_width
        held = [min(needed, width) for needed in pages_needed]
        num_pages = 1 + self.num_sequences * width
        free = list(rng.permutation(np.arange(1, num_pages)))
        table = np.zeros((self.num_sequences, width), np.int32)
        kinds = 2 if case.latent_dim is None else 1
        shape = (case.context, num_pages, kinds, case.num_kv_heads, case.page_size, case.head_dim)
        self.pools = np.full(shape, np.nan, np.float32)
        self.pool = self.pools[0]
        tokens: list[tuple[int, int]] = []
        for row, ((cached, new), n) in enumerate(zip(self.lengths, held, strict=True)):
            table[row, :n] = [free.pop() for _ in range(n)]
            if row < same:
                table[row, : first // page] = table[0, : first // page]
            seen = 0 if case.window is None else max(0, cached - case.window + 1)
            for position in range(seen, cached):
                self.kept(self.pools, table, row, position)[...] = self.written(row, position)
            tokens += [(row, cached + i) for i in range(new)]
        real, padding = len(tokens), self.num_tokens - len(tokens)
        starts = np.cumsum([0, *(n for _, n in self.lengths)])
        pad_rows = self.num_sequences - len(self.lengths)
        self.batch = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.int32),
            DeviceBatch(
                tokens=np.zeros(self.num_tokens),
                token_slots=np.full(self.num_tokens, -1),
                positions=np.array([p for _, p in tokens] + [0] * padding),
                sequence_ids=np.array([s for s, _ in tokens] + [self.num_sequences] * padding),
                query_start=np.concatenate([starts, np.full(pad_rows, real)]),
                kv_len=np.array([c + n for c, n in self.lengths] + [0] * pad_rows),
                page_tables=(table,),
                logits_tokens=np.zeros(self.num_sequences),
                num_tokens=np.array(real),
                num_sequences=np.array(len(self.lengths)),
            ),
        )

    def kept(self, pools: np.ndarray, table: np.ndarray, row: int, position: int) -> np.ndarray:
        """Where pools [C, pages, ...] have a token's key and value, [1 or 2, K, H]; on one device that is one pool."""
        context, page_size = self.case.context, self.case.page_size
        page = table[row, position // (context * page_size) % table.shape[1]]
        return pools[position % context, page, :, :, position // context % page_size]

    def quantized(self, pools: np.ndarray) -> QuantizedPool:
        """Pools [..., H] as data and scales [...]; where nobody wrote, scales are NaN and data the worst."""
        dtype = jnp.dtype(self.case.kv_dtype)
        scales = np.abs(pools.astype(np.float64)).max(-1) / LARGEST[dtype.name]
        data = pools / np.where(scales > 0, scales, 1)[..., None]
        worst = np.nan
        if dtype == jnp.int8:
            data, worst = np.rint(data), -128
        data = np.where(np.isnan(scales)[..., None], worst, data)
        return QuantizedPool(data.astype(dtype), scales.astype(np.float32))

    def given(self, backend: Backend) -> np.ndarray:
        """The pools, but of plain XLA with unseen values that are finite: that they are it leaves to whoever writes."""
        pools = self.pools.copy()
        if backend.name == "xla":
            values = pools[..., -1, :, :, : self.case.latent_dim]
            values[np.isnan(values)] = 1e30
        return pools

    def as_held(self, pools: Any) -> Ragged:
        """The same with what quantized pools, their leaves [C, ...], hold of the keys and values that are seen.

        AssertionError where they do not hold them as well as their dtype can.
        """
        data, scales = (np.asarray(leaf, np.float64) for leaf in (pools.data, pools.scales))
        numbers, other = data * scales[..., None], copy(self)
        other.keys, other.values = ([array.copy() for array in arrays] for arrays in (self.keys, self.values))
        table, steps = np.asarray(self.batch.page_tables[0]), LARGEST[self.case.kv_dtype or ""]
        for row, (cached, new) in enumerate(self.lengths):
            first = 0 if self.case.window is None else max(0, cached - self.case.window + 1)
            for position in range(first, cached + new):
                held, wrote = self.kept(numbers, table, row, position), self.written(row, position)
                most = np.abs(wrote).max(-1, keepdims=True)
                # Half a step of int8; of float8, 3 bits of a number, and half of the least.
                bound = most / 2 / steps if steps == 127 else np.maximum(np.abs(wrote) / 16, most / steps / 1024)
                assert (np.abs(held - wrote) <= 1.0001 * bound).all(), (held, wrote)
                other.keys[row][position] = held[0]
                other.values[row][position] = held[-1][..., : self.case.latent_dim]
        return other

    def written(self, row: int, position: int) -> np.ndarray:
        """What the pool holds of a token: [2, K, H], or [1, K, H] where keys begin with their values."""
        key, value = self.keys[row][position], self.values[row][position]
        return np.stack([key, value] if self.case.latent_dim is None else [key])

    def flat(self, parts: list[np.ndarray], num_heads: int) -> np.ndarray:
        """Rows of new tokens, flat, padded with NaN to T."""
        padded = np.full((self.num_tokens, num_heads, self.case.head_dim), np.nan, np.float32)
        if parts:
            joined = np.concatenate(parts)
            padded[: len(joined)] = joined
        return padded

    def inputs(self, backend: Backend | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """q, k, v of this step's tokens; of padding NaN, but as in `given` for its values."""
        new = [n for _, n in self.lengths]
        keys = [k[len(k) - n :] for k, n in zip(self.keys, new, strict=True)]
        values = [v[len(v) - n :] for v, n in zip(self.values, new, strict=True)]
        kv_heads = self.case.num_kv_heads
        q, k = self.flat(self.queries, self.case.num_heads), self.flat(keys, kv_heads)
        v = self.flat(values, kv_heads) if self.case.latent_dim is None else None
        if backend is not None and backend.name == "xla":
            (k if v is None else v)[sum(new) :, :, : self.case.latent_dim] = 1e30
        return q, k, v

    def expected(self) -> np.ndarray:
        """Attention of every real token, [num real, N, H], one query and one head at a time, in float64; of a case with
        a latent_dim [num real, N, latent_dim]."""
        case, rows = self.case, []
        for (cached, new), keys, values, queries in zip(
            self.lengths, self.keys, self.values, self.queries, strict=True
        ):
            for i in range(new):
                position = cached + i
                first = 0 if case.window is None else max(0, position - case.window + 1)
                heads = []
                for head in range(case.num_heads):
                    kv_head = head * case.num_kv_heads // case.num_heads
                    logits = keys[first : position + 1, kv_head].astype(np.float64) @ queries[i, head] * case.scale
                    if case.soft_cap is not None:
                        logits = case.soft_cap * np.tanh(logits / case.soft_cap)
                    extra = 0.0 if self.sinks is None else np.exp(np.float64(self.sinks[head]) - logits.max())
                    weights = np.exp(logits - logits.max())
                    heads.append(weights / (weights.sum() + extra) @ values[first : position + 1, kv_head])
                rows.append(heads)
        return np.array(rows).reshape(-1, case.num_heads, case.latent_dim or case.head_dim)
