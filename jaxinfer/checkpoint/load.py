"""A checkpoint's tensors to sharded parameters, one tensor at a time, straight to each device's part and dtype.

Host memory: on CPU the numbers are read into the buffers the parameters keep, so the peak is the parameters plus a
few megabytes. Elsewhere at most two tensors are on the host at once: one being read, one on its way to the devices.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxinfer.checkpoint.reader import CheckpointReader, TensorInfo
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.sharding.rules import param_shardings

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # XLA's CPU client takes over a host array without a copy from this alignment on
_NAMES_SHOWN = 3


def load_params(
    reader: CheckpointReader,
    abstract: Mapping[str, Any],
    axes: Mapping[str, Any],
    family: Family,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """The nested dict of jax.Arrays that `abstract` describes, read from `reader`.

    abstract: nested dict of ShapeDtypeStruct. axes: the same nesting, logical axes per parameter. family: says which
    tensor fills which parameter of `config`. mesh: None puts everything on the default device. dtype: of the
    floating-point parameters; None keeps each one's abstract dtype.

    ValueError, naming the tensors, for missing, unexpected or wrongly shaped ones.
    """
    started = time.perf_counter()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sources = family.find_sources(config, reader.tensors)
    assert set(paths) == set(sources), sorted(set(paths) ^ set(sources))
    shardings = treedef.flatten_up_to(shardings_of(abstract, axes, mesh))
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in zip(paths, leaves, strict=True)}
    check_tensors(reader, sources, shapes, family)

    infos = [reader.tensors[sources[path].name] for path in paths]
    in_file_order = sorted(range(len(paths)), key=lambda i: (infos[i].file, infos[i].offset))
    arrays: dict[int, jax.Array] = {}
    previous: jax.Array | None = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        for i in in_file_order:
            wanted = np.dtype(leaves[i][1].dtype)
            if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
                wanted = np.dtype(dtype)
            arrays[i] = load_param(reader, sources[paths[i]], shapes[paths[i]], wanted, shardings[i], pool)
            if previous is not None:
                previous.block_until_ready()  # so that at most two tensors wait on the host
            previous = arrays[i]
    jax.block_until_ready(previous)
    log.info(
        "loaded %d parameters, %.2f GB, in %.2f s from %s",
        len(arrays),
        sum(array.nbytes for array in arrays.values()) / 1e9,
        time.perf_counter() - started,
        reader.directory,
    )
    return jax.tree.unflatten(treedef, [arrays[i] for i in range(len(paths))])


def shardings_of(abstract: Mapping[str, Any], axes: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Every parameter's sharding: over the mesh by its axes' rules, or whole on the default device without one."""
    if mesh is not None:
        return param_shardings(abstract, axes, mesh)
    whole = SingleDeviceSharding(jax.device_put(0).device)
    return jax.tree.map(lambda _: whole, dict(abstract))


def load_param(
    reader: CheckpointReader,
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    pool: Executor | None = None,
) -> jax.Array:
    """One parameter: every distinct slice that this process's devices hold is read (and cast) once."""
    info = reader.tensors[source.name]
    row_size = math.prod(info.shape[1:])
    first = 0 if source.rows is None else source.rows[0] * row_size

    def read(start: int, read_shape: tuple[int, ...]) -> np.ndarray:
        out = aligned_empty(read_shape, dtype)
        reader.read_flat(info.name, first + start, out.reshape(-1), pool)
        return out

    # What no single range of bytes can serve is read whole and cut here: transposed tensors, those fused head by head.
    whole: np.ndarray | None = None
    if source.transpose or source.head_rows is not None:
        stored = read(0, (_num_rows(info, source), *info.shape[1:]))
        if source.head_rows is not None:
            stored = stored.reshape(shape[0], -1, *info.shape[1:])[:, slice(*source.head_rows)]
            stored = stored.reshape(-1, *info.shape[1:])
        whole = _own((stored.T if source.transpose else stored).reshape(shape))
        del stored

    slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    block: tuple[tuple[int, int], np.ndarray] | None = None
    shards: list[jax.Array] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in slices:
            rows = bounds[0] if bounds else (0, 1)
            if whole is not None:
                value = whole[index]
            else:
                # Devices come row by row, so one block of whole rows serves all that cut it into columns.
                if block is None or block[0] != rows:
                    start = rows[0] * math.prod(shape[1:])
                    block = rows, read(start, (rows[1] - rows[0], *shape[1:]) if shape else ())
                value = block[1][(slice(None), *index[1:])] if shape else block[1]
            slices[bounds] = _own(value)
        shards.append(jax.device_put(slices[bounds], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _num_rows(info: TensorInfo, source: Source) -> int:
    return info.shape[0] if source.rows is None else source.rows[1] - source.rows[0]


def _own(value: np.ndarray) -> np.ndarray:
    """`value`, or a copy where it is a strided or misaligned view: what a device buffer may take over."""
    if value.flags.c_contiguous and value.ctypes.data % _ALIGNMENT == 0:
        return value
    out = aligned_empty(value.shape, value.dtype)
    np.copyto(out, value)
    return out


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that XLA's CPU client can use in place."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + nbytes].view(dtype).reshape(shape)


def check_tensors(
    reader: CheckpointReader, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], family: Family
) -> None:
    """ValueError, naming tensors, where a checkpoint lacks some, holds others, or holds them in another shape."""
    used = dict.fromkeys(source.name for source in sources.values())
    missing = [name for name in used if name not in reader.tensors]
    if missing:
        raise ValueError(
            f"{reader.directory} lacks {len(missing)} of the {len(used)} tensors of this model: {name_some(missing)}; "
            f"copy the whole checkpoint, or check that config.json belongs to it"
        )
    unexpected = [name for name in reader.tensors if name not in used and not family.ignores(name)]
    if unexpected:
        raise ValueError(
            f"{reader.directory} holds {len(unexpected)} tensors this model has no place for: {name_some(unexpected)}; "
            f"check that config.json belongs to it"
        )
    rows_used: dict[str, int] = {}
    for path, source in sources.items():
        info, shape = reader.tensors[source.name], shapes[path]
        picked = _picked_shape(info, source, shape[0] if shape else 1)
        if picked is None or not splits_into(picked, shape):
            raise ValueError(
                f"tensor {info.name!r} has shape {list(info.shape)}, which does not fill {path} of shape "
                f"{list(shape)}; check that config.json belongs to this checkpoint"
            )
        if source.rows is not None:
            rows_used[source.name] = max(rows_used.get(source.name, 0), source.rows[1])
        if source.head_rows is not None:
            rows_used[source.name] = max(rows_used.get(source.name, 0), source.head_rows[1] * shape[0])
    for name, rows in rows_used.items():
        if rows != reader.tensors[name].shape[0]:
            raise ValueError(
                f"tensor {name!r} has {reader.tensors[name].shape[0]} rows and the model uses {rows}; "
                f"check that config.json belongs to this checkpoint"
            )


def _picked_shape(info: TensorInfo, source: Source, num_heads: int) -> tuple[int, ...] | None:
    """The shape of the part of a tensor that a Source names, before it is split; None where there is no such part."""
    shape = info.shape
    if source.rows is not None:
        if not shape or source.rows[1] > shape[0]:
            return None
        shape = (source.rows[1] - source.rows[0], *shape[1:])
    if source.head_rows is not None:
        if not shape or shape[0] % num_heads or source.head_rows[1] > shape[0] // num_heads:
            return None
        shape = (num_heads * (source.head_rows[1] - source.head_rows[0]), *shape[1:])
    return shape[::-1] if source.transpose else shape


def splits_into(stored: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether splitting dimensions in place makes `shape` of `stored`: [N * H, D] gives [N, H, D], never [D, N * H]."""
    rest = [size for size in shape if size != 1]
    for size in stored:
        filled = 1
        while filled < size and rest:
            filled *= rest.pop(0)
        if filled != size:
            return False
    return not rest


def name_some(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
