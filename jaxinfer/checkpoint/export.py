"""Parameters back to a Hugging Face checkpoint: the Sources of a family read the other way round. Written in shards.

Fused tensors are put together again, [N, H, D] becomes [N * H, D], and only the tensors being written are in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxinfer.checkpoint.reader import DTYPES, INDEX_FILE, SINGLE_FILE
from jaxinfer.models.families.base import Source

MAX_SHARD_BYTES = 5_000_000_000
_BATCH_BYTES = 256_000_000  # read and written at a time, or one tensor where that is larger
_HEADS = ("q_heads", "kv_heads")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Param:
    """A parameter as it is to be written: its shape here, its logical axes, and the dtype in the file."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in a checkpoint, where heads and what each holds are one dimension."""
        sizes: list[int] = []
        for position, size in enumerate(self.shape):
            if position and self.axes[position - 1] in _HEADS and self.axes[position] == "head_dim":
                sizes[-1] *= size
            else:
                sizes.append(size)
        return tuple(sizes)


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of the checkpoint, of the parameters at `paths`, in the order of their places in it.

    expert: the index of the one whose tensor this is, where a parameter's experts have a tensor each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    paths: tuple[str, ...]
    expert: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_export(params: Mapping[str, Param], sources: Mapping[str, Source]) -> list[ExportTensor]:
    """The checkpoint's tensors, in the order in which `sources` first names them."""
    paths_of: dict[str, list[str]] = {}
    for path, source in sources.items():
        paths_of.setdefault(source.name, []).append(path)  # experts' tensors by the pattern of their names
    tensors = []
    for pattern, paths in paths_of.items():
        paths.sort(key=lambda path: sources[path].rows or sources[path].head_rows or sources[path].every or (0, 0))
        first, source = params[paths[0]], sources[paths[0]]
        stack = first.shape[:1] if source.stacked else ()
        shapes = [params[path].stored_shape[len(stack) :] for path in paths]
        if source.every is not None:
            shapes = [(*shapes[0][:-1], sum(shape[-1] for shape in shapes))]
        if source.transpose:
            shapes = [shape[::-1] for shape in shapes]
        shape = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])
        names = source.names(math.prod(first.shape[:1]))
        if names == [pattern]:
            tensors.append(ExportTensor(pattern, stack + shape, first.dtype, tuple(paths)))
        else:
            tensors += [ExportTensor(name, shape, first.dtype, tuple(paths), i) for i, name in enumerate(names)]
    return tensors


def assemble(
    tensor: ExportTensor, params: Mapping[str, Param], sources: Mapping[str, Source], values: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The tensor's numbers from those of its parameters."""
    source = sources[tensor.paths[0]]
    parts = [values[path] if tensor.expert is None else values[path][tensor.expert] for path in tensor.paths]
    parts = [part.astype(tensor.dtype, copy=False) for part in parts]
    if source.head_rows is not None:  # head by head: [N, rows of each part, ...]
        heads = params[tensor.paths[0]].shape[0]
        parts = [
            part.reshape(heads, -1, *params[path].stored_shape[1:])
            for part, path in zip(parts, tensor.paths, strict=True)
        ]
        whole = np.concatenate(parts, axis=1)
    else:
        if tensor.expert is None:
            parts = [part.reshape(params[path].stored_shape) for part, path in zip(parts, tensor.paths, strict=True)]
        if source.every is not None:  # the first of each part, the second of each, ...
            parts = [np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)]
        if source.transpose:
            parts = [np.swapaxes(part, -1, -2) for part in parts]
        axis = 1 if source.stacked and tensor.expert is None else 0
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
    return np.ascontiguousarray(whole.reshape(tensor.shape))


def export_safetensors(
    directory: Path,
    params: Mapping[str, Param],
    sources: Mapping[str, Source],
    read: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a safetensors checkpoint into `directory`; returns the number of bytes of its tensors.

    read: parameter paths to their numbers, asked for a few at a time. One file, or numbered shards with an index where
    the tensors take more than max_shard_bytes. OSError where the file system refuses.
    """
    tensors = plan_export(params, sources)
    shards = list(_groups(tensors, max_shard_bytes))
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(tensor.nbytes for tensor in tensors)
    for name, shard in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write_header(file, shard)
            values: dict[str, np.ndarray] = {}
            for batch in _groups(shard, _BATCH_BYTES):
                paths = dict.fromkeys(path for tensor in batch for path in tensor.paths)
                values = {path: values[path] for path in paths if path in values}  # one parameter of many experts
                values.update(read([path for path in paths if path not in values]))
                for tensor in batch:
                    file.write(assemble(tensor, params, sources, values).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _groups(tensors: Sequence[ExportTensor], max_bytes: int) -> Iterator[list[ExportTensor]]:
    """Consecutive tensors that together take at most max_bytes; a larger one is alone."""
    group: list[ExportTensor] = []
    for tensor in tensors:
        if group and sum(other.nbytes for other in group) + tensor.nbytes > max_bytes:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _write_header(file: BinaryIO, tensors: Sequence[ExportTensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of eight
    file.write(len(text).to_bytes(8, "little") + text)
