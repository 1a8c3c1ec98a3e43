"""Reading a parsed `config.json`: defaults, types and limits, with errors that name the key. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.config import Activation
from jaxinfer.quantization import CONFIG_KEY, READABLE

# Names transformers gives to the same function.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# Options that change the arithmetic; each must be absent, null, false, 0 or empty, but where a family has a default for
# it.
UNSUPPORTED = (
    "add_cross_attention",
    "alibi",
    "attention_sinks",
    "is_encoder_decoder",
    "num_local_experts",
    "parallel_attn",
    CONFIG_KEY,
    "use_alibi",
    "use_parallel_residual",
)


class Fields:
    """The keys of one `config.json`. A key that is absent has the family's default, or is reported as missing.

    JSON's null is not "absent": it is None, and only the `optional_` readers accept it.
    """

    def __init__(self, family: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.family = family
        self._values = {**defaults, **values}
        for name in UNSUPPORTED:
            if name not in defaults:
                self.refuse(name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def with_values(self, values: Mapping[str, Any]) -> Fields:
        """The same, with some keys set anew."""
        return Fields(self.family, values, self._values)

    def get(self, name: str) -> Any:
        if name not in self._values:
            raise ValueError(f"config.json of a {self.family} model lacks {name!r}; copy the checkpoint's own file")
        return self._values[name]

    def wrong(self, name: str, want: str) -> ValueError:
        return ValueError(f"config.json: {name}={self.get(name)!r} must be {want} in a {self.family} model")

    def refuse(self, name: str) -> None:
        """ValueError when an option that is not implemented is switched on."""
        if self._values.get(name):
            readable = f"; quantized models that are read: {READABLE}" if name == CONFIG_KEY else ""
            raise ValueError(
                f"config.json: {name}={self._values[name]!r} is not supported in a {self.family} model; "
                f"only models without it can be loaded{readable}"
            )

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.wrong(name, f"an integer of at least {minimum}")
        return value

    def optional_integer(self, name: str, minimum: int = 1) -> int | None:
        return None if self.get(name) is None else self.integer(name, minimum)

    def number(self, name: str) -> float:
        """A finite number above zero."""
        value = self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.wrong(name, "a positive number")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(x, int | float) and x > 0 for x in value):
            raise self.wrong(name, "a list of positive numbers")
        return tuple(float(x) for x in value)

    def section(self, name: str) -> dict[str, Any]:
        """A nested object; empty when absent or null."""
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def activation(self, name: str) -> Activation:
        if self.get(name) not in ACTIVATIONS:
            raise self.wrong(name, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self.get(name)]

    def head_dim(self) -> int:
        """`head_dim`, or where it is absent or null, the model width over the number of heads."""
        if self._values.get("head_dim") is not None:
            return self.integer("head_dim")
        width, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if width % heads:
            raise self.wrong("hidden_size", f"a multiple of num_attention_heads={heads} where head_dim is not given")
        return width // heads

    def layer_kinds(self, default: list[str]) -> tuple[str, ...]:
        """`layer_types`, "full_attention" or "sliding_attention" for each layer; `default` where absent or null."""
        kinds = self._values.get("layer_types")
        if kinds is None:
            return tuple(default)
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != len(default) or not all(kind in known for kind in kinds):
            raise self.wrong("layer_types", f"a list of {len(default)} (num_hidden_layers) of {' or '.join(known)}")
        return tuple(kinds)

    def windows(self, default: list[str], window: int | None) -> list[int | None]:
        """Each layer's window: `window` where `layer_kinds` says sliding, None elsewhere."""
        kinds = self.layer_kinds(default)
        if window is None and "sliding_attention" in kinds:
            raise self.wrong("layer_types", "free of sliding_attention where no sliding_window is in use")
        return [window if kind == "sliding_attention" else None for kind in kinds]
