"""What a product with a quantized weight is asked for, and weights of real models for tests and compile checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductCase:
    """All that is static about one weight's products, but for how many rows they have.

    num_out, num_in: of the weight [out, in]. num_groups: scales of an output, each shared by in / num_groups inputs.
    bits: of a value, 4 or 8. dtype: name of the dtype of rows and results.
    """

    num_out: int
    num_in: int
    num_groups: int
    bits: int = 4
    dtype: str = "bfloat16"

    @property
    def group_size(self) -> int:
        return self.num_in // self.num_groups


def _case(num_out: int, num_in: int) -> ProductCase:
    return ProductCase(num_out, num_in, num_in // 128)


CASES: dict[str, ProductCase] = {
    "Llama 3.1 8B, up": _case(14336, 4096),
    "Llama 3.1 8B, down": _case(4096, 14336),
    "Llama 3.1 8B, key of 8 devices": _case(128, 4096),
    "Llama 3.1 70B, up": _case(28672, 8192),
    "Llama 3.1 70B, down": _case(8192, 28672),
    "Qwen3 32B, down of 4 devices": _case(5120, 6400),
    "Gemma 3 27B, up": _case(21504, 5376),
}
