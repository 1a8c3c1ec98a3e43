"""Orbax checkpoints: a model directory whose weights are one Orbax pytree under `params/`.

The directory also carries config.json and the tokenizer's files, so it is a model like any other. Parameters are
restored straight into the sharding and dtype asked for, whatever they were saved with.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoint import quantize
from jaxinfer.checkpoint.load import name_some, on_default_device
from jaxinfer.sharding.spmd import elsewhere

PARAMS_DIR = "params"
_MARKER_FILES = ("_CHECKPOINT_METADATA", "_METADATA")  # what Orbax writes into the directory of a pytree


def params_dir(directory: str | Path) -> Path | None:
    """Where a model directory keeps an Orbax pytree: under `params/`, or in the directory itself; None for nowhere."""
    for place in (Path(directory) / PARAMS_DIR, Path(directory)):
        if any((place / marker).is_file() for marker in _MARKER_FILES):
            return place
    return None


def is_orbax(directory: str | Path) -> bool:
    """Whether a model directory's weights are an Orbax checkpoint."""
    return params_dir(directory) is not None


def save_orbax(directory: str | Path, params: Mapping[str, Any]) -> None:
    """Save a nested dict of jax.Arrays under `directory`/params; every process calls it. The caller adds config.json.

    ValueError where Orbax cannot write: a full disk, a path without permission, weights that are there already.
    """
    import orbax.checkpoint as ocp

    target = Path(directory).absolute() / PARAMS_DIR
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    try:
        with _quiet("absl"), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(target, args=ocp.args.PyTreeSave(params))
    except Exception as error:  # tensorstore reports what the file system says through many types
        _drop_late_results()
        raise ValueError(f"{target}: the checkpoint could not be written ({_first_line(error)})") from error


def load_orbax(
    directory: str | Path, abstract: Mapping[str, Any], shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The nested dict of jax.Arrays that `abstract` describes, restored from a model directory. See load_params.

    Each device reads its own part. Host memory beside the parameters: up to 1 GB of what is being read, or the two
    largest parameters. Weights to be quantized are read and rounded a layer at a time.
    ValueError, naming parameters, for missing, unexpected or wrongly shaped ones.
    """
    placed = on_default_device(abstract) if shardings is None else dict(shardings)
    with OrbaxReader(directory) as reader:
        stored = abstract if reader.is_quantized else quantize.before(abstract)
        reader.check(
            {_path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
        )
        if jax.tree.structure(stored) == jax.tree.structure(abstract):
            return reader.restore(abstract, _dtypes(abstract), placed)
        params: dict[str, Any] = {"layers": {}}
        for part, wanted, where in zip(_parts(stored), _parts(abstract), _parts(placed), strict=True):
            read = reader.restore(part, _dtypes(part), quantize.shardings_before(where))
            made = jax.block_until_ready(jax.tree.map(quantize.quantized, read, wanted, where))
            params = {**params, **made, "layers": {**params["layers"], **made.get("layers", {})}}
        return params


def _parts(params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All but the layers, and then these one by one, each where it is among the parameters."""
    yield {name: value for name, value in params.items() if name != "layers"}
    yield from ({"layers": {index: layer}} for index, layer in params["layers"].items())


def _dtypes(abstract: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, abstract)


class OrbaxReader:
    """The parameters of an Orbax model directory: `shapes` and `dtypes` by path. A context manager."""

    def __init__(self, directory: str | Path) -> None:
        import orbax.checkpoint as ocp
        from etils import epath  # Orbax's own path type

        found = params_dir(directory)
        if found is None:
            raise ValueError(f"{directory} holds no Orbax checkpoint; expected one in {PARAMS_DIR}/")
        self.directory = found.absolute()
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.directory)).tree
        except Exception as error:
            _drop_late_results()
            raise self._unreadable(error) from error
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            self.shapes[_path_name(path)] = tuple(leaf.shape)
            self.dtypes[_path_name(path)] = np.dtype(leaf.dtype)
        # Orbax refuses an array larger than what it may have in flight; twice the largest keeps two on their way.
        largest = max((math.prod(shape) * self.dtypes[path].itemsize for path, shape in self.shapes.items()), default=0)
        # Each process reads by itself, as it may have none of what another reads.
        own = jax.process_index()
        meeting = ocp.options.MultiprocessingOptions()
        if jax.process_count() > 1:
            meeting = ocp.options.MultiprocessingOptions(own, {own}, str(own))
        limit = 2 * math.ceil(largest / 1e9) + 1
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=limit, multiprocessing_options=meeting)
        self._checkpointer = ocp.Checkpointer(handler, multiprocessing_options=meeting)

    def __enter__(self) -> OrbaxReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._checkpointer.close()

    @property
    def is_quantized(self) -> bool:
        """Whether weights among the parameters are values and scales."""
        return any(path.endswith("/values") for path in self.shapes)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError, naming parameters, unless the checkpoint holds exactly these."""
        if missing := [path for path in shapes if path not in self.shapes]:
            raise ValueError(
                f"{self.directory} lacks {len(missing)} of the {len(shapes)} parameters of this model: "
                f"{name_some(missing)}; check that config.json belongs to it"
            )
        if unexpected := [path for path in self.shapes if path not in shapes]:
            raise ValueError(
                f"{self.directory} holds {len(unexpected)} parameters this model has no place for: "
                f"{name_some(unexpected)}; check that config.json belongs to it"
            )
        for path, shape in shapes.items():
            if self.shapes[path] != shape:
                raise ValueError(
                    f"{self.directory}: parameter {path} has shape {list(self.shapes[path])} where the model's is "
                    f"{list(shape)}; check that config.json belongs to it"
                )

    def restore(self, abstract: Any, dtypes: Any, shardings: Any) -> dict[str, Any]:
        """The parameters of `abstract`, which may be some of those that are there, as jax.Arrays."""
        import orbax.checkpoint as ocp

        leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
        item: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        arrays: dict[str, jax.Array] = {}
        for (path, leaf), dtype, sharding in zip(
            leaves, structure.flatten_up_to(dtypes), structure.flatten_up_to(shardings), strict=True
        ):
            name = _path_name(path)
            if not sharding.addressable_devices:  # of a stage of other processes'
                arrays[name] = elsewhere(tuple(leaf.shape), dtype, sharding)
                continue
            _insert(item, name, leaf)
            how = ocp.ArrayRestoreArgs(dtype=np.dtype(dtype), sharding=sharding, global_shape=tuple(leaf.shape))
            _insert(arguments, name, how)
        restored = self._restore(item, arguments) if item else {}
        arrays |= {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
        return jax.tree.unflatten(structure, [arrays[_path_name(path)] for path, _ in leaves])

    def read(self, dtypes: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
        """Some parameters as numpy arrays, by path, in the given dtypes."""
        import orbax.checkpoint as ocp

        item: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        for path, dtype in dtypes.items():
            _insert(item, path, jax.ShapeDtypeStruct(self.shapes[path], dtype))
            _insert(arguments, path, ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))
        restored = self._restore(item, arguments)
        return {_path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}

    def _restore(self, item: Any, arguments: Any) -> Any:
        import orbax.checkpoint as ocp

        restore = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        try:
            return self._checkpointer.restore(self.directory, args=restore)
        except Exception as error:
            _drop_late_results()
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.directory}: Orbax cannot read it ({_first_line(error)}); copy the checkpoint again")


@functools.cache
def _drop_late_results() -> None:
    """Silence reads and writes that end after one beside them failed.

    Orbax closes its event loop at the first failure; tensorstore then reports every other operation to a loop that is
    gone, and Python prints a traceback for each, long after the caller was told what is wrong.
    """
    report = sys.unraisablehook

    def report_unless_late(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = report_unless_late


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's logger from printing tracebacks of errors that it raises as well."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _insert(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[name] = value


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _first_line(error: Exception) -> str:
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))  # what tensorstore says last, and all that matters
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
