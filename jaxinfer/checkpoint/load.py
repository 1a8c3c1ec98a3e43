"""A checkpoint's tensors to sharded parameters, one tensor at a time, straight to each device's part and dtype.

Host memory: on CPU the numbers are read into the buffers the parameters keep, so the peak is the parameters plus a
few megabytes, or one expert's matrix. Elsewhere at most two parameters are on the host at once:
one being read, one on its way to the devices.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from jaxinfer.checkpoint import quantize
from jaxinfer.checkpoint.mxfp4 import PACKED_BYTES, unpack_mxfp4
from jaxinfer.checkpoint.reader import CheckpointReader, TensorInfo
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.quantization import num_bytes
from jaxinfer.sharding.spmd import elsewhere

log = logging.getLogger(__name__)

_ALIGNMENT = 64  # XLA's CPU client takes over a host array without a copy from this alignment on
_NAMES_SHOWN = 3
_ROWS_COMPARED = 1024  # of a head and an embedding at a time
_COLUMNS = 64  # transposed at a time: several times as fast as all at once


def load_params(
    reader: CheckpointReader,
    abstract: Mapping[str, Any],
    family: Family,
    config: ModelConfig,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The nested dict of jax.Arrays that `abstract` describes, read from `reader`.

    abstract: nested dict of ShapeDtypeStruct. family: says which tensor fills which parameter of `config`. shardings:
    the same nesting; None puts everything on the default device. Weights that are quantized are so one by one, before
    the next is there.

    ValueError, naming the tensors, for missing, unexpected or wrongly shaped ones.
    """
    started = time.perf_counter()
    kept, treedef = jax.tree.flatten(abstract, is_leaf=None if reader.packed else quantize.is_quantized)
    placed = treedef.flatten_up_to(on_default_device(abstract) if shardings is None else shardings)
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract if reader.packed else quantize.before(abstract))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    sources = find_sources(reader, family, config)
    check_packed(reader, sources, paths)
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in zip(paths, leaves, strict=True)}
    check_tensors(reader, sources, shapes, family)

    infos = [reader.tensors[sources[path].names(1)[0]] for path in paths]
    in_file_order = sorted(range(len(paths)), key=lambda i: (infos[i].file, infos[i].offset))
    arrays: dict[int, Any] = {}
    previous: Any = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        for i in in_file_order:
            wanted = np.dtype(leaves[i][1].dtype)
            sharding = quantize.shardings_before(placed[i])
            array = load_param(reader, sources[paths[i]], shapes[paths[i]], wanted, sharding, pool)
            arrays[i] = quantize.quantized(array, kept[i], placed[i])
            jax.block_until_ready(previous)  # so that at most two parameters wait on the host
            previous = arrays[i]
    jax.block_until_ready(previous)
    log.info(
        "loaded %d parameters, %.2f GB, in %.2f s from %s",
        len(arrays),
        num_bytes(jax.tree.leaves(arrays)) / 1e9,
        time.perf_counter() - started,
        reader.directory,
    )
    return jax.tree.unflatten(treedef, [arrays[i] for i in range(len(paths))])


def find_sources(reader: CheckpointReader, family: Family, config: ModelConfig) -> dict[str, Source]:
    """Every parameter's place among the reader's tensors, a packed weight's values and scales apart."""
    found: dict[str, Source] = {}
    for path, source in family.find_sources(config, reader.tensors).items():
        if source.names(1)[0] in reader.packed:
            found[f"{path}/values"] = source
            found[f"{path}/scales"] = replace(source, name=f"{source.name}_scale")
        else:
            found[path] = source
    return found


def check_packed(reader: CheckpointReader, sources: Mapping[str, Source], paths: Collection[str]) -> None:
    """ValueError unless a checkpoint has packed exactly those weights that the model at `paths` keeps quantized."""
    for path in sorted(set(paths) ^ set(sources)):
        weight = path.removesuffix("/values").removesuffix("/scales")
        is_packed = f"{weight}/values" in sources
        name = sources[f"{weight}/values" if is_packed else weight].names(1)[0]
        raise ValueError(
            f"{reader.directory}: tensor {name!r} is {'' if is_packed else 'not '}quantized; read are checkpoints in "
            "which the projections of all layers are, and nothing else"
        )


def on_default_device(abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter's sharding, where it is whole on the default device."""
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
    """One parameter: every distinct slice that this process's devices hold is read (and cast) once.

    Of experts stacked in it, one at a time is on the host beside the parameter.
    """
    bounds = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    if not bounds:  # of a stage of other processes'
        return elsewhere(shape, dtype, sharding)
    matrices = stored_matrices(reader, source, shape)
    slices: dict[Bounds, np.ndarray] = {}
    if source.stacked:
        for cut in bounds.values():
            slices.setdefault(cut, aligned_empty([stop - start for start, stop in cut], dtype))
        for expert, matrix in enumerate(matrices):
            own = [(cut, out) for cut, out in slices.items() if cut[0][0] <= expert < cut[0][1]]
            if own:  # other processes' devices may hold the others
                reading = _Reading(reader, matrix, source, shape[1:], dtype, pool)
                for cut, out in own:
                    reading.fill(out[expert - cut[0][0]], cut[1:])
    else:
        reading = _Reading(reader, matrices[0], source, shape, dtype, pool)
        for cut in bounds.values():
            if cut not in slices:
                slices[cut] = _own(reading.cut(cut))
    shards = [jax.device_put(slices[cut], device) for device, cut in bounds.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


Bounds = tuple[tuple[int, int], ...]  # [start, stop) of every dimension


@dataclass(frozen=True)
class StoredMatrix:
    """What one Source names, of one expert where they are stacked: numbers from `start` on in a tensor.

    shape: of the numbers. scales: the tensor of their exponents, where they are packed: `start` counts bytes then.
    """

    info: TensorInfo
    start: int
    shape: tuple[int, ...]
    scales: TensorInfo | None


def stored_matrices(reader: CheckpointReader, source: Source, shape: tuple[int, ...]) -> list[StoredMatrix]:
    """What fills a parameter of this shape: one matrix, or one for each expert. Every tensor must be there.

    ValueError for a tensor with another number of experts than the parameter.
    """
    scales = None if source.scales is None else reader.tensors[source.scales]
    infos = [reader.tensors[name] for name in source.names(math.prod(shape[:1]))]
    own_axis = source.stacked and "*" not in source.name
    if own_axis:
        if infos[0].shape[:1] != shape[:1]:
            raise ValueError(_does_not_fill(infos[0], source.name, shape))
        infos = infos * shape[0]
    matrices = []
    for index, info in enumerate(infos):
        own = info.shape[1:] if own_axis else info.shape
        start = index * math.prod(own) if own_axis else 0
        if scales is not None:
            if info.dtype != np.uint8 or scales.dtype != np.uint8 or info.shape != (*scales.shape, PACKED_BYTES):
                raise ValueError(
                    f"tensors {info.name!r} {list(info.shape)} and {scales.name!r} {list(scales.shape)} are not "
                    f"MXFP4 blocks of {PACKED_BYTES} bytes and their scales; copy the checkpoint again"
                )
            own = (*own[:-2], own[-2] * 2 * PACKED_BYTES)
        matrices.append(StoredMatrix(info, start, own, scales))
    return matrices


class _Reading:
    """The slices of a parameter, or of one expert's part of it; what serves several of them is read once."""

    def __init__(
        self,
        reader: CheckpointReader,
        matrix: StoredMatrix,
        source: Source,
        shape: tuple[int, ...],
        dtype: np.dtype,
        pool: Executor | None,
    ) -> None:
        assert not source.transpose or len(shape) == 2, source
        self._reader, self._matrix, self._dtype, self._pool = reader, matrix, dtype, pool
        self._is_transposed = source.transpose
        self._shape = shape[::-1] if source.transpose else shape  # as stored, and so are all below but in cut and fill
        row_size = math.prod(matrix.shape[1:])
        self._first = matrix.start + (0 if source.rows is None else source.rows[0] * row_size)
        self._block: tuple[tuple[int, int], np.ndarray] | None = None
        # What no single range of bytes can serve is read whole and cut here.
        in_place = not (source.head_rows or source.every or source.scales)
        self._whole = None if in_place else _own(self._read_whole(source).reshape(self._shape))

    def cut(self, bounds: Bounds) -> np.ndarray:
        """The numbers within `bounds`: an array of its own, or a view of one."""
        return self._cut(bounds[::-1]).T if self._is_transposed else self._cut(bounds)

    def _cut(self, bounds: Bounds) -> np.ndarray:
        columns = tuple(slice(*bound) for bound in bounds[1:])
        if self._whole is not None:
            return self._whole[(slice(*bounds[0]), *columns)]
        if not bounds:
            return self._read(0, ())
        # Devices come row by row, so one block of whole rows serves all that cut it into columns.
        if self._block is None or self._block[0] != bounds[0]:
            start, stop = bounds[0]
            rows = self._read(start * math.prod(self._shape[1:]), (stop - start, *self._shape[1:]))
            self._block = bounds[0], rows
        return self._block[1][(slice(None), *columns)]

    def fill(self, out: np.ndarray, bounds: Bounds) -> None:
        """The same, into `out`: straight from the file where that can be."""
        if self._is_transposed:
            _copy_by_columns(out, self.cut(bounds), self._pool)
            return
        rows_are_whole = all(bound == (0, size) for bound, size in zip(bounds[1:], self._shape[1:], strict=True))
        if self._whole is None and rows_are_whole:
            start = bounds[0][0] * math.prod(self._shape[1:])
            self._reader.read_flat(self._matrix.info.name, self._first + start, out.reshape(-1), self._pool)
        else:
            np.copyto(out, self._cut(bounds))

    def _read(self, start: int, shape: tuple[int, ...]) -> np.ndarray:
        out = aligned_empty(shape, self._dtype)
        self._reader.read_flat(self._matrix.info.name, self._first + start, out.reshape(-1), self._pool)
        return out

    def _read_whole(self, source: Source) -> np.ndarray:
        matrix = self._matrix
        if matrix.scales is not None:
            stored = self._read_packed(source.every)
        else:
            num_rows = matrix.shape[0] if source.rows is None else source.rows[1] - source.rows[0]
            stored = self._read(0, (num_rows, *matrix.shape[1:]))
        if source.head_rows is not None:
            stored = stored.reshape(self._shape[0], -1, *matrix.shape[1:])[:, slice(*source.head_rows)]
            stored = stored.reshape(-1, *matrix.shape[1:])
        if source.every is None or matrix.scales is not None:
            return stored
        return stored[slice_of(source.every)] if self._is_transposed else stored[..., slice_of(source.every)]

    def _read_packed(self, every: tuple[int, int] | None) -> np.ndarray:
        matrix = self._matrix
        assert matrix.scales is not None
        blocks = np.empty((*matrix.shape[:-1], matrix.shape[-1] // 2 // PACKED_BYTES, PACKED_BYTES), np.uint8)
        exponents = np.empty(blocks.shape[:-1], np.uint8)
        self._reader.read_flat(matrix.info.name, matrix.start, blocks.reshape(-1), self._pool)
        self._reader.read_flat(matrix.scales.name, matrix.start // PACKED_BYTES, exponents.reshape(-1), self._pool)
        if every is not None:
            blocks, exponents = blocks[slice_of(every)], exponents[slice_of(every)]
        return unpack_mxfp4(blocks, exponents).astype(self._dtype, copy=False)


def slice_of(every: tuple[int, int]) -> slice:
    return slice(every[0], None, every[1])


def _copy_by_columns(out: np.ndarray, transposed: np.ndarray, pool: Executor | None) -> None:
    """A transposed view into an array that is none, a few columns at a time: what the processor's cache holds."""

    def copy(start: int) -> None:
        columns = slice(start, start + _COLUMNS)
        np.copyto(out[:, columns], transposed[:, columns])

    list((map if pool is None else pool.map)(copy, range(0, out.shape[1], _COLUMNS)))


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
    used: dict[str, None] = {}
    for path, source in sources.items():
        used.update(dict.fromkeys(source.names(math.prod(shapes[path][:1]))))
        used.update({} if source.scales is None else {source.scales: None})
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
    for name in reader.tensors:
        if name not in used and name.endswith("lm_head.weight"):
            _check_tied(reader, name, sources["embed/weight"].name)
    rows: dict[str, tuple[int, int]] = {}  # of tensors taken apart: used, and there
    for path, source in sources.items():
        shape = shapes[path][1:] if source.stacked else shapes[path]
        for matrix in stored_matrices(reader, source, shapes[path]):
            picked = _picked_shape(matrix.shape, source, shape[0] if shape else 1)
            if picked is None or not splits_into(picked, shape):
                raise ValueError(_does_not_fill(matrix.info, path, shapes[path]))
            before, _ = rows.get(matrix.info.name, (0, 0))
            if source.rows is not None:
                rows[matrix.info.name] = max(before, source.rows[1]), matrix.shape[0]
            if source.head_rows is not None:
                rows[matrix.info.name] = max(before, source.head_rows[1] * shape[0]), matrix.shape[0]
    for name, (num_used, there) in rows.items():
        if num_used != there:
            raise ValueError(
                f"tensor {name!r} has {there} rows and the model uses {num_used}; "
                f"check that config.json belongs to this checkpoint"
            )


def _check_tied(reader: CheckpointReader, head: str, embed: str) -> None:
    """ValueError unless a head that the model does not read, since it is tied to the embedding, is the same."""
    shape = reader.tensors[embed].shape
    same = reader.tensors[head].shape == shape
    for start in range(0, shape[0] if same else 0, _ROWS_COMPARED):
        rows = start, min(start + _ROWS_COMPARED, shape[0])
        same = same and np.array_equal(reader.read(head, rows), reader.read(embed, rows))
    if not same:
        raise ValueError(
            f"{reader.directory}: {head!r} is not the same as {embed!r}, to which config.json ties it; set "
            f'"tie_word_embeddings": false there if the model has a head of its own'
        )


def _does_not_fill(info: TensorInfo, path: str, shape: tuple[int, ...]) -> str:
    return (
        f"tensor {info.name!r} has shape {list(info.shape)}, which does not fill {path} of shape "
        f"{list(shape)}; check that config.json belongs to this checkpoint"
    )


def _picked_shape(shape: tuple[int, ...], source: Source, num_heads: int) -> tuple[int, ...] | None:
    """The shape of the part of a matrix that a Source names, before it is split; None where there is no such part."""
    if source.rows is not None:
        if not shape or source.rows[1] > shape[0]:
            return None
        shape = (source.rows[1] - source.rows[0], *shape[1:])
    if source.head_rows is not None:
        if not shape or shape[0] % num_heads or source.head_rows[1] > shape[0] // num_heads:
            return None
        shape = (num_heads * (source.head_rows[1] - source.head_rows[0]), *shape[1:])
    if source.transpose:
        shape = shape[::-1]
    if source.every is not None:
        if not shape or shape[-1] % source.every[1]:
            return None
        shape = (*shape[:-1], shape[-1] // source.every[1])
    return shape


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
