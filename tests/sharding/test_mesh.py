"""The mesh: what is accepted, what is refused, and that plain jit runs over it."""

from __future__ import annotations

import pytest

from jaxinfer.sharding.mesh import AXES, make_mesh, parse_mesh
from tests.sharding.run_on_devices import run_on_devices


def test_parse() -> None:
    assert parse_mesh("data=2,tensor=4") == {"data": 2, "tensor": 4}
    assert parse_mesh(" tensor = 8 , ") == {"tensor": 8}
    assert parse_mesh("") == parse_mesh(" ") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "'tensor' is not AXIS=SIZE"),
        ("tensor=", "is not AXIS=SIZE"),
        ("tensor=-1", "is not AXIS=SIZE"),
        ("tensor=two", "is not AXIS=SIZE"),
        ("tensor=0", "tensor=0 must be a whole number of at least 1"),
        ("model=2", "'model' is not a mesh axis; the axes are data, fsdp, stage, context, expert, tensor"),
        ("tensor=2,tensor=2", "names 'tensor' twice"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_one_device() -> None:
    for spec in (None, "", {}, "tensor=1"):
        mesh = make_mesh(spec)
        assert mesh.axis_names == AXES
        assert mesh.size == 1


@pytest.mark.parametrize("spec", [{"tensor": 0}, {"tensor": True}, {"tensor": "2"}, {"model": 1}])
def test_mapping_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="mesh="):
        make_mesh(spec)  # type: ignore[arg-type]


def test_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match="needs 4096 devices and 1 are there; choose axis sizes that multiply to 1"):
        make_mesh("tensor=4096")


CODE = """
import logging
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxinfer.sharding.mesh import AXES, make_mesh
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")

mesh = make_mesh("tensor=4,data=2")
assert mesh.axis_names == AXES and dict(mesh.shape) == dict(data=2, fsdp=1, stage=1, context=1, expert=1, tensor=4)
assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
weight = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("tensor", None)))
x = jax.device_put(jnp.ones((4, 8)), NamedSharding(mesh, P("data")))
np.testing.assert_array_equal(jax.jit(lambda w, x: jnp.tanh(x @ w.T) + 1)(weight, x), np.tanh(x @ weight.T) + 1)

assert [d.id for d in make_mesh("tensor=3").devices.flat] == [0, 1, 2]
assert [d.id for d in make_mesh("tensor=2", jax.devices()[6:]).devices.flat] == [6, 7]

given = Mesh(np.array(jax.devices()).reshape(4, 2), ("tensor", "data"))
made = make_mesh(given)
assert made.axis_names == AXES and made.shape["tensor"] == 4 and made.shape["data"] == 2
for data in range(2):
    for tensor in range(4):
        assert made.devices[data, 0, 0, 0, 0, tensor] == given.devices[tensor, data]
try:
    make_mesh(Mesh(np.array(jax.devices()), ("model",)))
except ValueError as error:
    assert "'model' is not a mesh axis" in str(error)
else:
    raise AssertionError("an unknown axis was accepted")
print("done")
"""


def test_eight_devices() -> None:
    assert "done" in run_on_devices(CODE, 8)
