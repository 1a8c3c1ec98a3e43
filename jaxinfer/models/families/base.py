"""What a family file provides, and where each parameter's numbers lie in a checkpoint. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class Source:
    """A parameter's place in a checkpoint: one tensor, or some of its rows, or its transpose.

    name: the tensor's name. rows: the half-open range along its first axis (fused tensors). transpose: the tensor is
    stored [in, out]. The result is reshaped to the parameter's own shape, so [N * H, D] fills [N, H, D].
    """

    name: str
    rows: tuple[int, int] | None = None
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """architectures: the names in `config.json` this family answers for. `config` reads the parsed JSON, filling in
    defaults as transformers does; `sources` maps every parameter path ("layers/0/attention/q/weight") to its Source.
    `ignored`: prefixes of tensors that a checkpoint may hold and the model does not use (vision towers and the like).
    """

    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    sources: Callable[[ModelConfig], dict[str, Source]]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
