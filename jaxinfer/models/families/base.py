"""What a family file provides, and where each parameter's numbers lie in a checkpoint. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """A parameter's place in a checkpoint: one tensor, or some of its rows, or its transpose, or one for each expert.

    name: the tensor's name. rows: the half-open range along its first axis (tensors fused block after block).
    head_rows: the half-open range inside every head, where the tensor holds one block of rows a head after another
    (tensors fused head by head); their number is the parameter's first size. transpose: the parameter is a matrix, and
    its transpose is stored. every: the first and the step along the parameter's last axis, in a tensor where several
    parameters' numbers take turns along it.
    The result is reshaped to the parameter's own shape, so [N * H, D] fills [N, H, D].

    stacked: all this holds for each index of the parameter's first axis. The name's "*" is that index, or there is
    none and the tensor has that axis itself.
    scales: the numbers are packed as MXFP4 (OCP Microscaling Formats 1.0): `name` holds 4-bit numbers, two a byte and
    [..., blocks, 16], and this tensor the exponent of each block, plus 127.
    """

    name: str
    rows: tuple[int, int] | None = None
    head_rows: tuple[int, int] | None = None
    transpose: bool = False
    every: tuple[int, int] | None = None
    stacked: bool = False
    scales: str | None = None

    def names(self, size: int) -> list[str]:
        """The tensors of a parameter whose first axis has this size, but for its scales."""
        is_several = self.stacked and "*" in self.name
        return [self.name.replace("*", str(index)) for index in range(size)] if is_several else [self.name]


@dataclass(frozen=True)
class Family:
    """architectures: the names in `config.json` this family answers for. `config` reads the parsed JSON, filling in
    defaults as transformers does; `sources` maps every parameter path ("layers/0/attention/q/weight") to its Source.

    aliases: (prefix, other prefix) pairs: a tensor that `sources` names prefix + rest may be stored as other prefix +
    rest (a text model inside a multimodal one). ignored: shell patterns of tensors that a checkpoint may hold and the
    model does not use (vision towers, buffers of old releases).
    """

    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    sources: Callable[[ModelConfig], dict[str, Source]]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def find_sources(self, config: ModelConfig, tensors: Collection[str]) -> dict[str, Source]:
        """`sources`, with each tensor named as the checkpoint holding `tensors` names it.

        A tensor that is there under no name keeps its first one, for the loader to report as missing. One that is not
        there, but whose _blocks are, is packed: matrices [in, out] as [out, in].
        """
        found = {}
        for path, source in self.sources(config).items():
            name, packed = source.name, f"{source.name}_blocks"
            if name not in tensors and packed in tensors:
                found[path] = replace(source, name=packed, scales=f"{name}_scales", transpose=True)
                continue
            others = (new + name.removeprefix(old) for old, new in self.aliases if name.startswith(old))
            there = (n for n in (name, *others) if n.replace("*", "0") in tensors)
            found[path] = replace(source, name=next(there, name))
        return found

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor that no parameter reads is nevertheless expected."""
        return any(fnmatchcase(tensor, pattern) for pattern in self.ignored)
