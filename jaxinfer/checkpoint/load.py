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
from jaxinfer.models.families.base import Source
from jaxinfer.sharding.rules import param_shardings

log = logging.getLogger(__name__)

# Buffers that transformers once saved beside the weights; they hold nothing a model has to be told.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_ALIGNMENT = 64  # XLA's CPU client takes over a host array without a copy from this alignment on
_NAMES_SHOWN = 3


def load_params(
    reader: CheckpointReader,
    abstract: Mapping[str, Any],
    axes: Mapping[str, Any],
    sources: Mapping[str, Source],
    mesh: Mesh | None = None,
    dtype: Any = None,
    ignored: Sequence[str] = (),
    prefixes: Sequence[str] = ("",),
) -> dict[str, Any]:
    """The nested dict of jax.Arrays that `abstract` describes, read from `reader`.

    abstract: nested dict of ShapeDtypeStruct. axes: the same nesting, logical axes per parameter. sources: parameter
    path to Source. mesh: None puts everything on the default device. dtype: of the floating-point parameters; None
    keeps each one's abstract dtype. ignored: prefixes of tensors that may be there and are not used. prefixes: what a
    checkpoint may write before a source's name; for each name the first that is there counts.

    ValueError, naming the tensors, for missing, unexpected or wrongly shaped ones.
    """
    started = time.perf_counter()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert set(paths) == set(sources), sorted(set(paths) ^ set(sources))
    if mesh is None:
        shardings: list[Sharding] = [SingleDeviceSharding(jax.device_put(0).device)] * len(leaves)
    else:
        shardings = treedef.flatten_up_to(param_shardings(abstract, axes, mesh))
    names = _resolve_names(reader, sources, ignored, prefixes)
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in zip(paths, leaves, strict=True)}
    _check_shapes(reader, sources, names, shapes)

    infos = [reader.tensors[names[sources[path].name]] for path in paths]
    in_file_order = sorted(range(len(paths)), key=lambda i: (infos[i].file, infos[i].offset))
    arrays: dict[int, jax.Array] = {}
    previous: jax.Array | None = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        for i in in_file_order:
            wanted = np.dtype(leaves[i][1].dtype)
            if dtype is not None and jnp.issubdtype(wanted, jnp.floating):
                wanted = np.dtype(dtype)
            arrays[i] = _load_one(reader, infos[i], sources[paths[i]], shapes[paths[i]], wanted, shardings[i], pool)
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


def _load_one(
    reader: CheckpointReader,
    info: TensorInfo,
    source: Source,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    pool: Executor,
) -> jax.Array:
    """One parameter: every distinct slice that this process's devices hold is read (and cast) once."""
    row_size = math.prod(info.shape[1:])
    first = 0 if source.rows is None else source.rows[0] * row_size

    def read(start: int, read_shape: tuple[int, ...]) -> np.ndarray:
        out = aligned_empty(read_shape, dtype)
        reader.read_flat(info.name, first + start, out.reshape(-1), pool)
        return out

    whole: np.ndarray | None = None  # of a tensor that no range of bytes can serve: transposed, or cut inside its rows
    if source.transpose:
        rows = info.shape[0] if source.rows is None else source.rows[1] - source.rows[0]
        stored = read(0, (rows, *info.shape[1:]))
        whole = aligned_empty(shape, dtype)
        np.copyto(whole.reshape(stored.shape[::-1]), stored.T)
        del stored

    slices: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    rows_read: dict[tuple[int, int], np.ndarray] = {}
    shards: list[jax.Array] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        if bounds not in slices:
            leading = bounds[0] if bounds else (0, 1)
            if whole is not None:
                value = whole[index]
            elif bounds[1:] == tuple((0, size) for size in shape[1:]):
                stride = math.prod(shape[1:])
                value = read(leading[0] * stride, tuple(stop - start for start, stop in bounds))
            else:
                if leading not in rows_read:
                    rows_read.clear()  # devices come row by row; one block of rows at a time is enough
                    stride = math.prod(shape[1:])
                    rows_read[leading] = read(leading[0] * stride, (leading[1] - leading[0], *shape[1:]))
                value = rows_read[leading][(slice(None), *index[1:])]
            slices[bounds] = _own(value)
        shards.append(jax.device_put(slices[bounds], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


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


def _resolve_names(
    reader: CheckpointReader, sources: Mapping[str, Source], ignored: Sequence[str], prefixes: Sequence[str]
) -> dict[str, str]:
    """Each source's tensor name as this checkpoint writes it. ValueError for missing and unexpected tensors."""
    names: dict[str, str] = {}
    missing: list[str] = []
    for name in dict.fromkeys(source.name for source in sources.values()):
        found = next((prefix + name for prefix in prefixes if prefix + name in reader.tensors), None)
        if found is None:
            missing.append(name)
        else:
            names[name] = found
    if missing:
        raise ValueError(
            f"{reader.directory} lacks {len(missing)} of {len(missing) + len(names)} tensors: {_some(missing)}; "
            f"copy the whole checkpoint, or check that config.json belongs to it"
        )
    used = set(names.values())
    unexpected = [
        name
        for name in reader.tensors
        if name not in used and not name.startswith(tuple(ignored)) and not name.endswith(_BUFFERS)
    ]
    if unexpected:
        raise ValueError(
            f"{reader.directory} holds {len(unexpected)} tensors this model has no place for: {_some(unexpected)}; "
            f"check that config.json belongs to it"
        )
    return names


def _check_shapes(
    reader: CheckpointReader,
    sources: Mapping[str, Source],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """ValueError for the first tensor whose shape does not fill its parameters, and for fused rows left over."""
    fused_rows: dict[str, int] = {}
    for path, source in sources.items():
        info = reader.tensors[names[source.name]]
        stored = info.shape
        if source.rows is not None:
            fused_rows[info.name] = max(fused_rows.get(info.name, 0), source.rows[1])
            stored = (min(source.rows[1], stored[0] if stored else 0) - source.rows[0], *stored[1:])
        if not splits_into(stored[::-1] if source.transpose else stored, shapes[path]):
            rows = "" if source.rows is None else f" (rows {source.rows[0]} to {source.rows[1]})"
            raise ValueError(
                f"tensor {info.name!r}{rows} has shape {list(info.shape)}, which does not fill {path} of shape "
                f"{list(shapes[path])}; check that config.json belongs to this checkpoint"
            )
    for name, rows in fused_rows.items():
        if rows != reader.tensors[name].shape[0]:
            raise ValueError(
                f"tensor {name!r} has {reader.tensors[name].shape[0]} rows and the model uses {rows}; "
                f"check that config.json belongs to this checkpoint"
            )


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


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
