"""Routing as models define it, and experts against a loop over tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.layers.moe import MoE, combine, group_by_expert, route
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ExpertsConfig, LayerConfig, ModelConfig

T, E = 50, 12
LOGITS = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)
BIAS = np.random.default_rng(1).normal(size=E).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def chosen_weights(config: ExpertsConfig, bias: np.ndarray | None = None) -> np.ndarray:
    """Each token's weight of every expert, 0 for those not chosen."""
    weights, chosen = route(config, jnp.asarray(LOGITS), None if bias is None else jnp.asarray(bias))
    assert weights.shape == chosen.shape == (T, config.num_active)
    dense = np.zeros((T, E))
    np.put_along_axis(dense, np.asarray(chosen), np.asarray(weights), axis=1)
    assert np.all((dense > 0).sum(1) == config.num_active), "an expert was chosen twice"
    return dense


def test_softmax_then_choice() -> None:
    plain, normalised = (chosen_weights(ExpertsConfig(E, 3, normalize=normalize)) for normalize in (False, True))
    for logits, own, scaled in zip(LOGITS, plain, normalised, strict=True):
        scores = softmax(logits)
        kept = np.where(scores >= np.sort(scores)[-3], scores, 0)
        np.testing.assert_allclose(own, kept, rtol=1e-5)
        np.testing.assert_allclose(scaled, kept / kept.sum(), rtol=1e-5)


def test_choice_then_softmax() -> None:
    for logits, own in zip(LOGITS, chosen_weights(ExpertsConfig(E, 3, scoring="softmax_of_chosen")), strict=True):
        kept = logits >= np.sort(logits)[-3]
        np.testing.assert_allclose(own[kept], softmax(logits[kept]), rtol=1e-5)


def test_groups_by_their_best_expert() -> None:
    """DeepSeek V2: the 2 groups of 4 whose best expert scores highest; scores as they are, times a factor."""
    config = ExpertsConfig(E, 3, num_groups=4, num_active_groups=2, scaling=2.5)
    for logits, own in zip(LOGITS, chosen_weights(config), strict=True):
        scores = softmax(logits)
        groups = np.argsort(scores.reshape(4, 3).max(1))[-2:]
        inside = np.where(np.isin(np.arange(E) // 3, groups), scores, 0)
        np.testing.assert_allclose(own, 2.5 * np.where(inside >= np.sort(inside)[-3], inside, 0), rtol=1e-5)


def test_groups_by_their_two_best_with_a_bias() -> None:
    """DeepSeek V3: sigmoid scores, a bias that moves the choice alone, groups by their two best."""
    config = ExpertsConfig(
        E, 4, "sigmoid", True, 1e-20, scaling=1.5, score_bias=True, num_groups=3, num_active_groups=2, group_best=2
    )
    own = chosen_weights(config, BIAS)
    for logits, got in zip(LOGITS, own, strict=True):
        scores = 1 / (1 + np.exp(-logits))
        ranked = scores + BIAS
        groups = np.argsort(np.sort(ranked.reshape(3, 4), 1)[:, -2:].sum(1))[-2:]
        inside = np.where(np.isin(np.arange(E) // 4, groups), ranked, -np.inf)
        kept = np.where(inside >= np.sort(inside)[-4], scores, 0)
        np.testing.assert_allclose(got, 1.5 * kept / kept.sum(), rtol=1e-5)
    assert not np.array_equal(own > 0, chosen_weights(config, 0 * BIAS) > 0), "the bias moves nothing"


def test_rows_are_grouped_and_put_back() -> None:
    chosen = np.random.default_rng(2).permuted(np.tile(np.arange(E, dtype=np.int32), (T, 1)), axis=1)[:, :3]
    rows, group_sizes = group_by_expert(jnp.asarray(chosen), E)
    experts = chosen.reshape(-1)[np.asarray(rows)]
    assert np.all(np.diff(experts) >= 0)
    np.testing.assert_array_equal(group_sizes, np.bincount(experts, minlength=E))
    weights = np.random.default_rng(3).random((T, 3)).astype(np.float32)
    tokens = np.arange(T, dtype=np.float32)[:, None] + 1
    y = (experts[:, None] + 1) * tokens[np.asarray(rows) // 3]
    want = ((chosen + 1) * weights).sum(1, keepdims=True) * tokens
    np.testing.assert_allclose(combine(jnp.asarray(y), rows, jnp.asarray(weights)), want, rtol=1e-5)


LAYER = LayerConfig(1, 1, 4, 6, experts=ExpertsConfig(5, 2, shared_ffn_dim=7, shared_gate=True))


@pytest.mark.parametrize(("num_tokens", "clamp"), [(1, (1.7, 0.4)), (40, None), (40, (1.7, 0.4))])
def test_every_token_is_served_by_its_experts(num_tokens: int, clamp: tuple[float, float] | None) -> None:
    assert LAYER.experts is not None
    layer = replace(LAYER, experts=replace(LAYER.experts, clamp=clamp, bias=clamp is not None))
    moe = MoE(Parameters(np.float32, 0), ModelConfig("test", 8, 8, 8, (layer,)), layer)
    rng = np.random.default_rng(4)
    experts, shared, gate = moe.experts, moe.shared, moe.shared_gate
    assert shared is not None
    assert gate is not None
    if clamp is not None:
        for part in (experts.gate, experts.up, experts.down):
            assert part.bias is not None
            part.bias[...] = jnp.asarray(rng.normal(size=part.bias.shape), jnp.float32)
    x = rng.normal(size=(num_tokens, 8)).astype(np.float32)
    # All tokens alike: all rows go to the same experts, and the others have none.
    x = np.concatenate([x, np.tile(x[:1], (num_tokens, 1))])

    def part(name: str, expert: int, row: np.ndarray) -> np.ndarray:
        linear = getattr(experts, name)
        bias = 0 if linear.bias is None else np.asarray(linear.bias[...])[expert]
        return row @ np.asarray(linear.weight[...])[expert] + bias

    def one(row: np.ndarray) -> np.ndarray:
        weights, chosen = (np.asarray(part)[0] for part in moe.router(jnp.asarray(row[None])))
        total = np.asarray(jax.nn.sigmoid(gate(row[None])) * shared(jnp.asarray(row[None])))[0]
        for weight, expert in zip(weights, chosen, strict=True):
            before, up = part("gate", expert, row), part("up", expert, row)
            if clamp is None:
                hidden = before / (1 + np.exp(-before)) * up
            else:
                before, up = np.minimum(before, clamp[1]), np.clip(up, -clamp[1], clamp[1])
                hidden = before / (1 + np.exp(-clamp[0] * before)) * (up + 1)
            total = total + weight * part("down", expert, hidden)
        return total

    y, load = moe(jnp.asarray(x))
    np.testing.assert_allclose(y, [one(row) for row in x], atol=1e-5)
    _, chosen = moe.router(jnp.asarray(x))
    np.testing.assert_array_equal(load, np.bincount(np.asarray(chosen).reshape(-1), minlength=5))
    is_real = np.arange(len(x)) < num_tokens
    padded, load = moe(jnp.asarray(x), jnp.asarray(is_real))
    np.testing.assert_allclose(padded[is_real], y[is_real], atol=1e-5)
    np.testing.assert_array_equal(load, np.bincount(np.asarray(chosen)[is_real].reshape(-1), minlength=5))
    of_all = jax.nn.sigmoid(gate(jnp.asarray(x))) * shared(jnp.asarray(x))
    np.testing.assert_allclose(padded[~is_real], of_all[~is_real], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 5}, "num_experts=12 is not a multiple of num_groups=5"),
        ({"num_active": 13}, "num_active=13 experts a token are more than the 12"),
        ({"num_groups": 4, "num_active_groups": 1, "num_active": 4}, "more than the 3 to choose from"),
        ({"num_groups": 6, "num_active_groups": 2, "group_best": 3}, "group_best=3"),
    ],
)
def test_what_cannot_be_chosen_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ExpertsConfig(E, 2), **changes)
