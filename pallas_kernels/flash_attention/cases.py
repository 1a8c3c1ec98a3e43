"""What flash attention is asked for, and the shapes of real models for tests, compile checks and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FlashCase:
    """All that is static about one kind of layer's attention over whole sequences.

    head_dim: of queries and keys; value_dim: of values and outputs.
    causal: a query at position i sees keys at j <= i. window: only those with j > i - window; it needs causal.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap).
    has_segments: a query sees keys of its own segment only.
    dtype: name of the dtype of queries, keys and values.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    has_segments: bool = False
    dtype: str = "bfloat16"

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    def fault(self) -> str | None:
        """None, or what is wrong with the case itself, whoever serves it."""
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} kv heads"
        if self.head_dim < 1 or self.value_dim < 1:
            return f"head dims {self.head_dim} and {self.value_dim} must be at least 1"
        if self.window is not None and self.window < 1:
            return f"window {self.window} is less than 1"
        if self.window is not None and not self.causal:
            return "a window needs causal attention"
        if self.soft_cap is not None and self.soft_cap <= 0:
            return f"soft cap {self.soft_cap} is not above 0"
        return None


def _case(num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int | None = None, **fields: Any) -> FlashCase:
    fields = {"scale": head_dim**-0.5} | fields
    return FlashCase(num_heads, num_kv_heads, head_dim, head_dim if value_dim is None else value_dim, **fields)


CASES: dict[str, FlashCase] = {
    "Llama 3.1 8B": _case(32, 8, 128),
    "Llama 3.1 8B, packed segments": _case(32, 8, 128, has_segments=True),
    "Llama 3.1 70B": _case(64, 8, 128),
    "Qwen3 32B": _case(64, 8, 128),
    "Qwen2.5 7B": _case(28, 4, 128),
    "Mistral 7B v0.1": _case(32, 8, 128, window=4096),
    "Gemma 2 9B": _case(16, 8, 256, soft_cap=50.0),
    "Gemma 3 27B, window": _case(32, 16, 128, scale=168**-0.5, window=1024),
    "gpt-oss 20B, window": _case(64, 8, 64, window=128),
    "StarCoder (MQA)": _case(48, 1, 128),
    "Phi-2 (head dim 80)": _case(32, 32, 80),
    "DeepSeek V3, one of 8 tensor shards": _case(16, 16, 192, 128),
    "Llama 3.1 8B, not causal": _case(32, 8, 128, causal=False),
    "Llama 3.1 8B, float32": _case(32, 8, 128, dtype="float32"),
}
