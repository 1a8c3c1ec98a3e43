"""Which weights are kept as whole numbers, and how many inputs share a scale. Imports no jax.

Quantized are the projections of the decoder's layers: attention's, the feed-forward's, every expert's. What is small or
decides much stays as it is: embeddings and the head, norms, biases, routers, and the two up-projections of latent
attention, of which one is multiplied from the other side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_KEY = "quantization_config"  # of config.json
_OWN, _COMPRESSED = "jaxinfer", "compressed-tensors"
READABLE = f"those written by jaxinfer.convert, {_COMPRESSED} of packed weights, and mxfp4 of gpt-oss"


@dataclass(frozen=True)
class Quantization:
    """A weight is values * scales, values being whole numbers of `bits` bits, -2 ** (bits - 1) left out.

    group_size: how many neighbours among a projection's inputs share a scale, or, where that does not divide them,
    their greatest common divisor; None: all inputs of an output share one.
    """

    bits: int
    group_size: int | None

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def scales_of(self, axes: Mapping[str, int], inputs: Collection[str]) -> dict[str, int]:
        """A weight's axes to its scales': as many, each shorter by how many numbers along it share a scale.

        inputs: those of the axes that are summed over.
        """
        sizes, left = dict(axes), self.group_size or math.prod(axes.values())
        for axis in reversed([axis for axis in axes if axis in inputs]):
            shared = math.gcd(axes[axis], left)
            sizes[axis], left = axes[axis] // shared, left // shared
            if sizes[axis] > 1:
                break
        return sizes


def num_bytes(arrays: Iterable[Any]) -> int:
    """Of arrays, or of what has their shapes and dtypes; two int4 share a byte, whatever their dtype says."""
    bits = (
        math.prod(array.shape) * (4 if array.dtype.name == "int4" else 8 * array.dtype.itemsize) for array in arrays
    )
    return sum(bits) // 8


BY_NAME = {"int8": Quantization(8, None), "int4": Quantization(4, 128)}


def check_name(name: str | None) -> None:
    """ValueError for what is not one of BY_NAME, nor None."""
    if name is not None and name not in BY_NAME:
        raise ValueError(f"quantization={name!r} is not supported; use one of {', '.join(BY_NAME)}, or leave it out")


def choose(wanted: str | None, stored: Quantization | None) -> Quantization | None:
    """How a model's weights are kept: as wanted, or as they are stored. ValueError where these contradict."""
    check_name(wanted)
    if wanted is None or stored is None:
        return stored if wanted is None else BY_NAME[wanted]
    if stored.name != wanted:
        raise ValueError(
            f"quantization={wanted!r}: the checkpoint's weights are {stored.name} already; leave it out, or give the "
            "checkpoint they were made from"
        )
    return stored


def to_config(quantization: Quantization) -> dict[str, Any]:
    """What config.json says of a checkpoint whose weights are kept so."""
    return {"quant_method": _OWN, "bits": quantization.bits, "group_size": quantization.group_size}


def from_config(config_json: Mapping[str, Any]) -> Quantization | None:
    """How a checkpoint's weights are kept; None for as numbers, or where its family says more.

    ValueError for a method, or a variant of one, that is not read.
    """
    written = config_json.get(CONFIG_KEY)
    method = written.get("quant_method") if isinstance(written, Mapping) else None
    if method not in (_OWN, _COMPRESSED):
        return None
    assert isinstance(written, Mapping)
    stored = written if method == _OWN else _weights_of(written)
    bits, group_size = stored.get("bits"), stored.get("group_size")
    if bits not in (4, 8) or not (group_size is None or (type(group_size) is int and group_size > 0)):
        raise ValueError(
            f"config.json: {CONFIG_KEY} of {method} has bits={bits!r}, group_size={group_size!r}; read are 4 or 8 "
            "bits, in groups of 1 and more or none"
        )
    return Quantization(bits, group_size)


def _weights_of(written: Mapping[str, Any]) -> dict[str, Any]:
    """The one scheme for weights in what compressed-tensors writes; ValueError, naming what differs, for others."""
    groups = written.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    group = groups[0] if len(groups) == 1 and isinstance(groups[0], Mapping) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    wanted = (
        ("format", written.get("format"), ("pack-quantized",)),
        ("number of config_groups", len(groups), (1,)),
        ("targets", group.get("targets"), (["Linear"],)),
        ("type", weights.get("type"), ("int",)),
        ("symmetric", weights.get("symmetric"), (True,)),
        ("strategy", weights.get("strategy"), ("channel", "group")),
        ("actorder", weights.get("actorder"), (None, "static", "weight")),
        ("input_activations", group.get("input_activations"), (None,)),
        ("output_activations", group.get("output_activations"), (None,)),
        ("kv_cache_scheme", written.get("kv_cache_scheme"), (None,)),
    )
    for name, value, choices in wanted:
        if value not in choices:
            raise ValueError(
                f"config.json: {CONFIG_KEY} of {_COMPRESSED} has {name}={value!r}, and read is only "
                f"{' or '.join(map(repr, choices))}: weights alone, packed, of 4 or 8 bits"
            )
    group_size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and group_size is None:
        raise ValueError(f"config.json: {CONFIG_KEY} of {_COMPRESSED} lacks group_size; copy the checkpoint again")
    return {"bits": weights.get("num_bits"), "group_size": group_size}
