"""Orbax: what is saved comes back, in any layout and dtype, and what does not fit is named."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.orbax import _drop_late_results, is_orbax, load_orbax, save_orbax
from tests.sharding.run_on_devices import run_on_devices

SHAPES = {"embed": (16, 8), "norm": (8,)}
AXES = {"embed": {"weight": ("vocab", "embed")}, "norm": {"weight": ("embed",)}}


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: {"weight": jnp.asarray(rng.standard_normal(shape), dtype)} for name, shape in SHAPES.items()}


def abstract_of(shapes: dict[str, tuple[int, ...]], dtype: Any = jnp.float32) -> dict[str, Any]:
    return {name: {"weight": jax.ShapeDtypeStruct(shape, dtype)} for name, shape in shapes.items()}


@pytest.mark.parametrize("saved", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path: Path, saved: Any, wanted: Any) -> None:
    params = make_params(saved)
    assert not is_orbax(tmp_path)
    save_orbax(tmp_path, params)
    assert is_orbax(tmp_path)
    assert is_orbax(tmp_path / "params")
    loaded = load_orbax(tmp_path, abstract_of(SHAPES, wanted))
    want = jax.tree.map(lambda leaf: leaf.astype(wanted), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}


RESHARD = """
import jax, numpy as np
from tests.checkpoint.test_checkpoint_orbax import AXES, SHAPES, abstract_of, make_params
from jaxinfer.checkpoint.orbax import load_orbax, save_orbax
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.rules import param_shardings
params = make_params()
save_orbax({directory!r}, jax.device_put(params, param_shardings(params, AXES, make_mesh("tensor=4"))))
for spec in ("tensor=2,fsdp=2", "fsdp=4", None):
    shardings = param_shardings(params, AXES, make_mesh(spec))
    loaded = load_orbax({directory!r}, abstract_of(SHAPES), shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings, spec
print("every layout agrees")
"""


def test_restored_into_another_layout(tmp_path: Path) -> None:
    assert "every layout agrees" in run_on_devices(RESHARD.format(directory=str(tmp_path)), 4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**SHAPES, "head": (16, 8)}, r"lacks 1 of the 3 parameters of this model: 'head/weight'"),
        ({"embed": (16, 8)}, r"holds 1 parameters this model has no place for: 'norm/weight'"),
        ({**SHAPES, "norm": (9,)}, r"parameter norm/weight has shape \[8\] where the model's is \[9\]"),
    ],
)
def test_parameters_that_do_not_fit(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    save_orbax(tmp_path, make_params())
    with pytest.raises(ValueError, match=message):
        load_orbax(tmp_path, abstract_of(shapes))


def test_damage_and_absence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Orbax checkpoint"):
        load_orbax(tmp_path, abstract_of(SHAPES))
    save_orbax(tmp_path, make_params())
    for file in (tmp_path / "params").rglob("d/*"):
        file.unlink()
    with pytest.raises(ValueError, match="Orbax cannot read it") as error:
        load_orbax(tmp_path, abstract_of(SHAPES))
    assert "\n" not in str(error.value)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    save_orbax(tmp_path, make_params())
    with pytest.raises(ValueError, match="could not be written"):
        save_orbax(tmp_path, make_params())


def test_reads_that_end_after_another_failed_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: said.append(str(unraisable.exc_value)))
    _drop_late_results.cache_clear()
    save_orbax(tmp_path, make_params())
    with pytest.raises(ValueError, match="could not be written"):
        save_orbax(tmp_path, make_params())
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    assert said == ["something else"]
    _drop_late_results.cache_clear()
