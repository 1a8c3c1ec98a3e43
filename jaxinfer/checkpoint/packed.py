"""Checkpoints of compressed-tensors whose weights are packed: read as if each were a tensor of whole numbers.

Of a weight X there are X_packed, int32 [out, in * bits / 32], whose bytes hold the numbers plus 2 ** (bits - 1) in
order, the first of two in the low half; X_scale [out, groups of inputs]; and X_shape, which X_packed says too.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxinfer.checkpoint.reader import CHUNK_BYTES, CheckpointReader, TensorInfo
from jaxinfer.quantization import Quantization

_PACKED, _SHAPE = "_packed", "_shape"


def open_checkpoint(directory: str | Path, stored: Quantization | None) -> CheckpointReader:
    """The tensors of a safetensors directory whose config.json says that its weights are kept so."""
    return CheckpointReader(directory) if stored is None else PackedReader(directory, stored.bits)


class PackedReader(CheckpointReader):
    """`tensors` has int8 [out, in] in place of what is packed, under the name the weight would have."""

    def __init__(self, directory: str | Path, bits: int) -> None:
        super().__init__(directory)
        self._bits = bits
        self._bytes_of = {
            name.removesuffix(_PACKED): info for name, info in self.tensors.items() if name.endswith(_PACKED)
        }
        self.packed = frozenset(self._bytes_of)
        if not self.packed:
            raise ValueError(f"{directory}: config.json says that weights are packed, and none is; copy it again")
        hidden = {name + suffix for name in self.packed for suffix in (_PACKED, _SHAPE)}
        plain: Mapping[str, TensorInfo] = {name: info for name, info in self.tensors.items() if name not in hidden}
        self.tensors = {**plain, **{name: self._unpacked(name, info) for name, info in self._bytes_of.items()}}

    def _unpacked(self, name: str, info: TensorInfo) -> TensorInfo:
        if info.dtype != np.int32 or len(info.shape) != 2:
            raise ValueError(
                f"{info.file}: tensor {info.name!r} has shape {list(info.shape)} and dtype {info.dtype}, and packed "
                "weights are matrices of int32; copy the checkpoint again"
            )
        return replace(
            info, name=name, shape=(info.shape[0], info.shape[1] * 32 // self._bits), dtype=np.dtype(np.int8)
        )

    def read_flat(self, name: str, start: int, out: np.ndarray, pool: Executor | None = None) -> None:
        if name not in self.packed:
            super().read_flat(name, start, out, pool)
            return
        info, in_byte = self._bytes_of[name], 8 // self._bits
        assert start % in_byte == 0
        assert out.size % in_byte == 0

        def fill(begin: int) -> None:
            part = out[begin : begin + CHUNK_BYTES]
            stored = np.empty(part.size // in_byte, np.uint8)
            self._read_bytes(info, info.offset + (start + begin) // in_byte, stored)
            np.copyto(part, unpack(stored, self._bits), casting="unsafe")

        list((map if pool is None else pool.map)(fill, range(0, out.size, CHUNK_BYTES)))


def unpack(stored: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n] -> int8 [n * 8 / bits]."""
    if bits == 4:
        stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(-1)
    return (stored.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
