"""Reading safetensors checkpoints: the headers at once, each tensor (or a part of it) when asked for. Imports no jax.

Bytes come by positioned reads straight into the caller's array, not by memory mapping: a mapped checkpoint's pages
count as this process's memory until the kernel drops them, and a read can be split over threads and cast on the way.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

CHUNK_BYTES = 1 << 20  # read and cast at a time: small enough for the cache, large enough to hide a system call
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` bytes into `file`, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a safetensors directory, one file or several. A context manager; safe to use from threads.

    `tensors` maps each name to its TensorInfo. ValueError, naming the file and the fix, when the directory holds no
    weights, only pickled ones, an incomplete set of shards, or a damaged file.
    `packed`: those of them that are quantized weights' values, whose scales are beside them under the name + "_scale".
    """

    packed: frozenset[str] = frozenset()

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: Mapping[str, TensorInfo] = _list_tensors(self.directory)
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor, or its rows [start, stop) along the first axis, in its own dtype."""
        info = self.tensors[name]
        if rows is None:
            out = np.empty(info.shape, info.dtype)
            self.read_flat(name, 0, out.reshape(-1))
            return out
        stride = math.prod(info.shape[1:])
        out = np.empty((rows[1] - rows[0], *info.shape[1:]), info.dtype)
        self.read_flat(name, rows[0] * stride, out.reshape(-1))
        return out

    def read_flat(self, name: str, start: int, out: np.ndarray, pool: Executor | None = None) -> None:
        """Fill `out` (1-D, contiguous, any dtype: values are cast) from the tensor's elements start, start + 1, ...

        With a pool the work is split over its threads. Needs one chunk (1 MiB) of memory per thread beside `out`,
        and none when the dtypes agree.
        """
        info = self.tensors[name]
        assert out.ndim == 1
        assert out.flags.c_contiguous
        assert 0 <= start <= start + out.size <= info.size
        step = CHUNK_BYTES // info.dtype.itemsize
        spans = [(begin, min(begin + step, out.size)) for begin in range(0, out.size, step)]

        def fill(span: tuple[int, int]) -> None:
            part = out[span[0] : span[1]]
            offset = info.offset + (start + span[0]) * info.dtype.itemsize
            if out.dtype == info.dtype:
                self._read_bytes(info, offset, part)
            else:
                scratch = np.empty(part.size, info.dtype)
                self._read_bytes(info, offset, scratch)
                np.copyto(part, scratch, casting="unsafe")

        if pool is None or len(spans) == 1:
            for span in spans:
                fill(span)
        else:
            list(pool.map(fill, spans))

    def _read_bytes(self, info: TensorInfo, offset: int, out: np.ndarray) -> None:
        descriptor = self._descriptor(info.file)
        view = memoryview(out.view(np.uint8)).cast("B")
        while view:
            try:
                count = os.preadv(descriptor, [view], offset)
            except OSError as error:
                raise ValueError(f"{info.file}: cannot read tensor {info.name!r}: {error.strerror}") from error
            if count == 0:
                raise ValueError(f"{info.file} became shorter while being read; copy the checkpoint again")
            view, offset = view[count:], offset + count

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = _readable(file, lambda: os.open(file, os.O_RDONLY))
            return self._descriptors[file]


def _readable(file: Path, operation: Callable[[], Any]) -> Any:
    try:
        return operation()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror}; check that it exists and its permissions"
        ) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint; ValueError when there are none or some are missing."""
    entries = _readable(directory, lambda: sorted(directory.iterdir()))
    names = {entry.name for entry in entries}
    if INDEX_FILE in names:
        shards = sorted(set(read_weight_map(directory / INDEX_FILE).values()))
        missing = [shard for shard in shards if shard not in names]
        if missing:
            raise ValueError(
                f"{directory}: {INDEX_FILE} names {len(shards)} shards and {len(missing)} of them are missing, "
                f"the first {missing[0]!r}; copy the whole checkpoint"
            )
        return [directory / shard for shard in shards]
    if SINGLE_FILE in names:
        return [directory / SINGLE_FILE]
    found = [entry for entry in entries if entry.suffix == ".safetensors" and not entry.name.startswith("consolidated")]
    if found:
        return found
    pickled = [entry.name for entry in entries if entry.suffix in PICKLE_SUFFIXES]
    if pickled:
        raise ValueError(
            f"{directory} holds only pickled weights ({pickled[0]}), which can run code when read and are refused; "
            f"convert them to safetensors first"
        )
    raise ValueError(f"{directory} holds no weights; expected {SINGLE_FILE} or {INDEX_FILE} with its shards")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard file name, from a sharded checkpoint's index."""
    try:
        weight_map = json.loads(_readable(index, index.read_bytes))["weight_map"]
        shards_are_names = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise ValueError(f"{index} is not a safetensors index ({type(error).__name__}); copy it again") from error
    if not weight_map or not shards_are_names:
        raise ValueError(f"{index}: its weight_map must name files beside it; copy it again")
    return weight_map


def _list_tensors(directory: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(directory):
        for name, info in read_header(file).items():
            if name in tensors:
                raise ValueError(
                    f"{directory}: tensor {name!r} is in both {tensors[name].file.name} and {file.name}; keep one"
                )
            tensors[name] = info
    index = directory / INDEX_FILE
    if index.exists():
        for name, shard in read_weight_map(index).items():
            if name not in tensors:
                raise ValueError(f"{directory}: {INDEX_FILE} places {name!r} in {shard}, which lacks it; copy it again")
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; ValueError when it is damaged, cut short or of an unknown dtype."""
    with _readable(file, lambda: file.open("rb")) as handle:
        size = os.fstat(handle.fileno()).st_size
        prefix = _readable(file, lambda: handle.read(8))
        length = int.from_bytes(prefix, "little")
        if len(prefix) == 8 and length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file (its header would take {length} bytes); copy it again")
        if len(prefix) < 8 or size < 8 + length:
            raise ValueError(f"{file} is cut short: {size} bytes do not hold its header; copy it again")
        raw = _readable(file, lambda: handle.read(length))
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} has a damaged header ({type(error).__name__}); copy it again") from error
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(f"{file} is cut short: {size} bytes where its header promises {end}; copy it again")
    return tensors


def _tensor_info(file: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    dtype_name, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype_name not in DTYPES:
        raise ValueError(f"{file}: tensor {name!r} has dtype {dtype_name}; readable are {', '.join(DTYPES)}")
    if len(offsets) != 2 or not all(isinstance(number, int) and number >= 0 for number in (*shape, *offsets)):
        raise ValueError(f"{file} has a damaged header (the place of tensor {name!r}); copy it again")
    begin, end = offsets
    info = TensorInfo(name, shape, DTYPES[dtype_name], file, data_start + begin)
    if info.nbytes != end - begin:
        raise ValueError(
            f"{file} has a damaged header (tensor {name!r} of shape {list(shape)} and dtype {dtype_name} "
            f"in {end - begin} bytes); copy it again"
        )
    return info
