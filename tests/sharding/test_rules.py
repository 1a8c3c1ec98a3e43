"""Logical axes to mesh axes: what is cut where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxinfer.models.config import ExpertsConfig, LayerConfig, ModelConfig
from jaxinfer.models.model import Model
from jaxinfer.sharding.mesh import AXES
from jaxinfer.sharding.rules import param_shardings, partition_spec


def mesh(**sizes: int) -> Any:
    return AbstractMesh(tuple(sizes.get(name, 1) for name in AXES), AXES)


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "expected"),
    [
        (("q_heads", "head_dim", "embed"), (8, 4, 16), {"tensor": 4}, PartitionSpec("tensor")),
        (("q_heads", "head_dim", "embed"), (8, 4, 16), {"tensor": 4, "fsdp": 2}, PartitionSpec("tensor", None, "fsdp")),
        (("kv_heads", "head_dim", "embed"), (2, 4, 16), {"tensor": 4}, PartitionSpec()),
        (("kv_heads", "head_dim", "embed"), (4, 4, 16), {"tensor": 4}, PartitionSpec("tensor")),
        (("embed", "ffn"), (16, 12), {"tensor": 4}, PartitionSpec(None, "tensor")),
        (("vocab", "embed"), (32, 16), {"data": 4}, PartitionSpec()),
        (("experts", "embed", "ffn"), (8, 16, 4), {"expert": 8, "tensor": 2}, PartitionSpec("expert", None, "tensor")),
        ((None,), (7,), {"tensor": 2, "fsdp": 2}, PartitionSpec()),
        ((), (), {"tensor": 2}, PartitionSpec()),
    ],
)
def test_partition_spec(axes: Any, shape: Any, sizes: dict[str, int], expected: PartitionSpec) -> None:
    assert partition_spec(axes, shape, mesh(**sizes)) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("heads",), (8,), "w: 'heads' is not a logical axis; they are embed"),
        (("q_heads", "ffn"), (8, 8), "w: axes 'q_heads' and 'ffn' would both be cut by mesh axis 'tensor'"),
        (("q_heads",), (6,), "w: q_heads=6 is not a multiple of mesh axis tensor=4; use a tensor size that divides 6"),
        (("kv_heads",), (6,), "kv_heads=6 is not a multiple"),
        (("embed",), (8, 8), "do not fit shape"),
    ],
)
def test_refusals(axes: Any, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_spec(axes, shape, mesh(tensor=4), "w")


def test_every_parameter_of_a_model() -> None:
    """No parameter of a decoder with all its parts has an axis without a rule, and the large ones are all cut."""
    layer = LayerConfig(num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64)
    experts = ExpertsConfig(4, 2, bias=True, router_bias=True, score_bias=True, shared_ffn_dim=16, shared_gate=True)
    config = ModelConfig(
        "test", 128, 32, 64, (layer, replace(layer, experts=experts)),
        qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True,
        norm_placement="sandwich", qk_norm="head", tie_embeddings=False, learned_positions=True,
        per_layer_input_dim=8, per_layer_input_vocab=128, layer_scalar=True, attention_sinks=True,
    )  # fmt: skip
    model = Model(config, jnp.float32)
    shardings = param_shardings(model.abstract_params, model.logical_axes, mesh(tensor=2, fsdp=2))
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params)
    assert jax.tree.structure(shardings) == jax.tree.structure(model.abstract_params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim >= 2 and "per_layer" not in name:
            assert sharding.shard_shape(leaf.shape) != leaf.shape, name


def test_a_size_that_does_not_divide_names_its_parameter() -> None:
    abstract = {"layers": {"0": {"weight": jax.ShapeDtypeStruct((9, 4), jnp.float32)}}}
    axes = {"layers": {"0": {"weight": ("q_heads", "embed")}}}
    with pytest.raises(ValueError, match=r"layers/0/weight: q_heads=9 is not a multiple of mesh axis tensor=2"):
        param_shardings(abstract, axes, mesh(tensor=2))
