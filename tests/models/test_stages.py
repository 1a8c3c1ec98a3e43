"""Where a model is cut into stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxinfer.models.config import LayerConfig, ModelConfig
from jaxinfer.models.stages import _runs, cut_points

LAYER = LayerConfig(num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=16)


def lengths(config: ModelConfig, count: int) -> list[int]:
    runs = _runs(config, count)
    assert [index for run in runs for index in run] == list(range(len(config.layers)))
    return [len(run) for run in runs]


@pytest.mark.parametrize(("num_layers", "count", "longest"), [(8, 2, 4), (7, 3, 3), (126, 8, 16), (5, 4, 2), (4, 4, 1)])
def test_equal_layers_are_dealt_evenly(num_layers: int, count: int, longest: int) -> None:
    found = lengths(ModelConfig("llama", 1, 8, 8, (LAYER,) * num_layers), count)
    assert (len(found), max(found)) == (count, longest)


def test_bytes_count_and_not_layers() -> None:
    layers = (*(replace(LAYER, ffn_dim=1024),) * 2, *(LAYER,) * 20)
    assert lengths(ModelConfig("llama", 1, 8, 8, layers), 3) == [1, 1, 20]
    with_head = ModelConfig("llama", 60, 8, 8, (LAYER,) * 10, tie_embeddings=False)  # about as much as a layer
    assert lengths(with_head, 3) == [3, 4, 3]


def test_a_reader_of_keys_stays_with_their_owner() -> None:
    reader = replace(LAYER, kv_source=3)
    config = ModelConfig("llama", 1, 8, 8, (*(LAYER,) * 4, *(reader,) * 8, LAYER))
    assert cut_points(config) == (0, 1, 2, 3, 12)
    assert lengths(config, 5) == [1, 1, 1, 9, 1]
