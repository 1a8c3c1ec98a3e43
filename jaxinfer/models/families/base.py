"""What a family file provides, and where each parameter's numbers lie in a checkpoint. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """A parameter's place in a checkpoint: one tensor, or some of its rows, or its transpose.

    name: the tensor's name. rows: the half-open range along its first axis (tensors fused block after block).
    head_rows: the half-open range inside every head, where the tensor holds one block of rows a head after another
    (tensors fused head by head); their number is the parameter's first size. transpose: the tensor is stored
    [in, out]. The result is reshaped to the parameter's own shape, so [N * H, D] fills [N, H, D].
    """

    name: str
    rows: tuple[int, int] | None = None
    head_rows: tuple[int, int] | None = None
    transpose: bool = False


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

        A tensor that is there under no name keeps its first one, for the loader to report as missing.
        """
        found = {}
        for path, source in self.sources(config).items():
            others = (new + source.name.removeprefix(old) for old, new in self.aliases if source.name.startswith(old))
            name = source.name if source.name in tensors else next((n for n in others if n in tensors), source.name)
            found[path] = replace(source, name=name)
        return found

    def ignores(self, tensor: str) -> bool:
        """Whether a tensor that no parameter reads is nevertheless expected."""
        return any(fnmatchcase(tensor, pattern) for pattern in self.ignored)
