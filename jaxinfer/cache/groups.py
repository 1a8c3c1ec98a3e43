"""Which layers keep what: layers are grouped by the shape and lifetime of their keys and values. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.models.config import ModelConfig


@dataclass(frozen=True)
class KVGroup:
    """Layers that share one page table: same kv heads, head dim and window. `layers` own the pages.

    latent_dim: the first so many numbers of a key are its value, and pages hold keys alone; None: they hold both.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None
    layers: tuple[int, ...]
    latent_dim: int | None = None

    def table_width(self, max_model_len: int, max_chunk: int, page_size: int) -> int:
        """Slots in one sequence's page table; a window group's table is a ring whose slots are reused modulo."""
        full = -(-max_model_len // page_size)
        if self.window is None:
            return full
        return min(full, -(-(self.window + max_chunk) // page_size) + 1)


def kv_groups(config: ModelConfig) -> tuple[KVGroup, ...]:
    """The model's groups, full attention first, then by window; layers that read another's KV are in none."""
    members: dict[tuple[int, int, int | None, int | None], list[int]] = {}
    for index, layer in enumerate(config.layers):
        if layer.kv_source is None:
            kind = layer.num_kv_heads, layer.head_dim, layer.window, layer.latent_dim
            members.setdefault(kind, []).append(index)
    groups = [
        KVGroup(heads, dim, window, tuple(layers), latent) for (heads, dim, window, latent), layers in members.items()
    ]
    return tuple(sorted(groups, key=lambda g: (g.window is not None, g.window or 0, g.layers[0])))


def group_of_layer(config: ModelConfig) -> tuple[int, ...]:
    """For every layer, the index of the group whose pages it reads."""
    groups = kv_groups(config)
    owner = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return tuple(owner[i if layer.kv_source is None else layer.kv_source] for i, layer in enumerate(config.layers))
