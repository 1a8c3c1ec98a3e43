"""The device mesh: six named axes, any of size 1, from a flag, a mapping or a mesh the caller already has."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

AXES = ("data", "fsdp", "stage", "context", "expert", "tensor")

log = logging.getLogger(__name__)


def parse_mesh(text: str) -> dict[str, int]:
    """'data=2,tensor=4' to {'data': 2, 'tensor': 4}; an empty string to {}. Imports no jax."""
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value.isdecimal():
            raise ValueError(f"mesh={text!r}: {item!r} is not AXIS=SIZE; write for example 'data=2,tensor=4'")
        if name in sizes:
            raise ValueError(f"mesh={text!r} names {name!r} twice; give each axis one size")
        sizes[name] = int(value)
    _check(sizes, text)
    return sizes


def _check(sizes: Mapping[str, int], given: object) -> None:
    for name, size in sizes.items():
        if name not in AXES:
            raise ValueError(f"mesh={given!r}: {name!r} is not a mesh axis; the axes are {', '.join(AXES)}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"mesh={given!r}: {name}={size!r} must be a whole number of at least 1")


def make_mesh(
    spec: str | Mapping[str, int] | jax.sharding.Mesh | None, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """A mesh with all six axes, in the order of AXES, of Auto type: plain jit propagates the shardings.

    spec: axis sizes ('data=2,tensor=4' or a mapping; axes left out have size 1), a jax Mesh over some of the axes, or
    None for one device. The sizes multiply to the number of `devices` (jax's, by default). A smaller product is
    allowed in a single process: the first devices are used, and the log says which.
    """
    import jax
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    types = (AxisType.Auto,) * len(AXES)
    if isinstance(spec, Mesh):
        _check(dict(spec.shape), dict(spec.shape))
        given = [spec.axis_names.index(name) for name in AXES if name in spec.axis_names]
        grid = spec.devices.transpose(given).reshape([spec.shape.get(name, 1) for name in AXES])
        return Mesh(grid, AXES, axis_types=types)
    sizes = parse_mesh(spec) if isinstance(spec, str) else dict(spec or {})
    _check(sizes, spec)
    shape = tuple(sizes.get(name, 1) for name in AXES)
    available = list(jax.devices() if devices is None else devices)
    needed = math.prod(shape)
    if needed > len(available) or (needed < len(available) and jax.process_count() > 1):
        raise ValueError(
            f"mesh={spec!r} needs {needed} devices and {len(available)} are there; "
            f"choose axis sizes that multiply to {len(available)}"
        )
    if needed == len(available):
        # On TPUs this lays the axes along the wires of the slice, so neighbours on an axis are neighbours in metal; an
        # axis that is no product of the slice's own (8 of 4 x 4) has one of these split for it.
        grid = mesh_utils.create_device_mesh(shape, available, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    chosen = available[:needed]
    if needed > 1 or sizes:
        log.info("mesh %s uses %d of %d devices: %s", sizes, needed, len(available), chosen)
    return Mesh(np.asarray(chosen).reshape(shape), AXES, axis_types=types)
