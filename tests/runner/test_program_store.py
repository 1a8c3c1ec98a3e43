"""Programs on disk: what comes back is what was kept, and whatever is wrong with a file costs time and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.sharding.mesh import make_mesh


def compiled(factor: float) -> jax.stages.Compiled:
    """x -> {"scaled": factor * x}, its argument donated."""
    run = jax.jit(lambda x: {"scaled": factor * x}, donate_argnums=0)
    return run.lower(jax.ShapeDtypeStruct((8,), np.float32)).compile()


def store(directory: Path, made_from: str = "") -> ProgramStore:
    return ProgramStore(directory, make_mesh(None), made_from)


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_kept_program_comes_back(tmp_path: Path) -> None:
    assert store(tmp_path).load("triple") is None
    store(tmp_path).save("triple", compiled(3))
    program = store(tmp_path).load("triple")
    assert program is not None
    x = jnp.arange(8.0)
    np.testing.assert_array_equal(program(x)["scaled"], 3 * np.arange(8))
    assert x.is_deleted(), "donation is kept too"


def test_another_name_or_another_origin_is_another_program(tmp_path: Path) -> None:
    store(tmp_path).save(("scaled", 3), compiled(3))
    assert store(tmp_path).load(("scaled", 4)) is None
    assert store(tmp_path, "another model").load(("scaled", 3)) is None


def test_jax_settings_are_part_of_the_origin(tmp_path: Path) -> None:
    store(tmp_path).save("triple", compiled(3))
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not before)
    try:
        assert store(tmp_path).load("triple") is None
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:9], lambda data: b"", lambda data: b"x" + data]
)
def test_damaged_file_is_told_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    store(tmp_path).save("triple", compiled(3))
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert store(tmp_path).load("triple") is None
    assert "damaged" in caplog.text
    store(tmp_path).save("triple", compiled(3))
    assert store(tmp_path).load("triple") is not None
    assert only_file(tmp_path) == path


def test_full_disk_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    kept = store(tmp_path)
    with caplog.at_level(logging.WARNING):
        kept.save("a", compiled(1))
        kept.save("b", compiled(2))
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


def test_directory_is_its_owners(tmp_path: Path) -> None:
    store(tmp_path / "made" / "here")
    assert (tmp_path / "made" / "here").stat().st_mode & 0o777 == 0o700


def test_program_that_calls_back_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def answer(x: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((8,), np.float32), x)

    program = jax.jit(answer).lower(jax.ShapeDtypeStruct((8,), np.float32)).compile()
    kept = store(tmp_path)
    with caplog.at_level(logging.INFO):
        kept.save("callback", program)
    assert "callback will be compiled at every start" in caplog.text
    kept.save("triple", compiled(3))
    assert kept.load("triple") is not None
