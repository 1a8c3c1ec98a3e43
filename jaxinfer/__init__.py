"""jaxinfer: language-model inference in JAX. Names are imported on first use, so that importing the package is fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.config import EngineConfig
    from jaxinfer.engine import Engine
    from jaxinfer.llm import LLM
    from jaxinfer.loading import LoadedModel, load_model
    from jaxinfer.types import Request, RequestOutput, SamplingParams

_HOMES = {
    "LLM": "jaxinfer.llm",
    "Engine": "jaxinfer.engine",
    "EngineConfig": "jaxinfer.config",
    "LoadedModel": "jaxinfer.loading",
    "Request": "jaxinfer.types",
    "RequestOutput": "jaxinfer.types",
    "SamplingParams": "jaxinfer.types",
    "load_model": "jaxinfer.loading",
}

__all__ = ["LLM", "Engine", "EngineConfig", "LoadedModel", "Request", "RequestOutput", "SamplingParams", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
