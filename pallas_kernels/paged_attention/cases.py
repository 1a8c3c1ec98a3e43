"""Attention of real models, for tests, compile checks, benchmarks and tuning. Facts of their published configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class ModelCase:
    """One kind of layer of a model. Fields as in jaxinfer's AttentionCase; `name` says which layer it is."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    page_size: int = 16
    dtype: str = "bfloat16"
    latent_dim: int | None = None
    context: int = 1
    kv_dtype: str | None = None


def _case(
    name: str, num_heads: int, num_kv_heads: int, head_dim: int, *, scale: float | None = None, **fields: Any
) -> ModelCase:
    return ModelCase(
        name, num_heads, num_kv_heads, head_dim, scale=head_dim**-0.5 if scale is None else scale, **fields
    )


CASES: tuple[ModelCase, ...] = (
    _case("Llama 3.1 8B", 32, 8, 128),
    _case("Llama 3.1 70B", 64, 8, 128),
    _case("Llama 3.1 70B, one of 8 tensor shards", 8, 1, 128),
    _case("Qwen3 32B", 64, 8, 128),
    _case("Qwen2.5 7B", 28, 4, 128),
    _case("Mistral 7B v0.1", 32, 8, 128, window=4096),
    _case("Gemma 2 9B, full", 16, 8, 256, soft_cap=50.0),
    _case("Gemma 2 9B, window", 16, 8, 256, soft_cap=50.0, window=4096),
    _case("Gemma 3 27B, full", 32, 16, 128, scale=168**-0.5),
    _case("Gemma 3 27B, window", 32, 16, 128, scale=168**-0.5, window=1024),
    _case("gpt-oss 20B, full", 64, 8, 64, has_sinks=True),
    _case("gpt-oss 20B, window", 64, 8, 64, has_sinks=True, window=128),
    _case("StarCoder (MQA)", 48, 1, 128),
    _case("Llama 2 7B (MHA)", 32, 32, 128),
    _case("Phi-2 (head dim 80)", 32, 32, 80),
    _case("Phi-3 mini (head dim 96)", 32, 32, 96, window=2047),
    _case("head dim 192", 16, 4, 192),
    _case("Llama 3.1 8B, float32", 32, 8, 128, dtype="float32"),
    _case("Llama 3.1 8B, pages of 64", 32, 8, 128, page_size=64),
    _case("Llama 3.1 8B, int8 cache", 32, 8, 128, page_size=32, kv_dtype="int8"),
    _case("Llama 3.1 8B, float8 cache, pages of 64", 32, 8, 128, page_size=64, kv_dtype=FP8),
    _case("Llama 3.1 70B, one of 8 tensor shards, int8 cache", 8, 1, 128, page_size=32, kv_dtype="int8"),
    _case("Gemma 3 27B, window, float8 cache", 32, 16, 128, scale=168**-0.5, window=1024, page_size=32, kv_dtype=FP8),
    _case("gpt-oss 20B, window, int8 cache", 64, 8, 64, has_sinks=True, window=128, page_size=32, kv_dtype="int8"),
    _case("Llama 2 7B (MHA), int8 cache", 32, 32, 128, page_size=32, kv_dtype="int8"),
    _case("DeepSeek V3 (MLA), int8 cache", 128, 1, 576, latent_dim=512, scale=0.1352, page_size=32, kv_dtype="int8"),
    _case("DeepSeek V2 Lite (MLA)", 16, 1, 576, latent_dim=512, scale=0.1147),
    _case("DeepSeek V3 (MLA)", 128, 1, 576, latent_dim=512, scale=0.1352),
    _case("DeepSeek V3, one of 8 tensor shards", 16, 1, 576, latent_dim=512, scale=0.1352),
    _case("Llama 3.1 8B, one of 4 context shards", 32, 8, 128, context=4),
    _case("gpt-oss 20B, window, one of 2 context shards", 64, 8, 64, has_sinks=True, window=128, context=2),
    _case("DeepSeek V3, one of 8 tensor, 4 context shards", 16, 1, 576, latent_dim=512, scale=0.1352, context=4),
)
