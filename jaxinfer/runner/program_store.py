"""Compiled programs on disk, found by what they are made from: a second start neither traces nor compiles.

XLA's own persistent cache is keyed by the traced program, and tracing is most of what is left of a start when nothing
has to be compiled. Here the key is all that tracing and compiling read: the source of this package, the versions of
what it stands on, the machine, jax's settings, and what the engine says its programs depend on. Functions exchanged in
a running process (monkeypatching) are not seen.

A program comes out of a file as machine code, so the directory must be as trusted as the package itself; it is made
readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import sys
import tempfile
from collections.abc import Hashable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import pallas_kernels
from jaxinfer.config import compiler_flags

log = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
# Programs that call back into Python (kernels in interpret mode), and devices whose programs can not leave the process.
# How pickle says the first depends on what it meets, and on Python's release.
_NOT_WRITTEN_OUT = (
    AttributeError,
    TypeError,
    pickle.PicklingError,
    ValueError,
    NotImplementedError,
    jax.errors.JaxRuntimeError,
)


class ProgramStore:
    """The programs of one engine in `directory`. made_from: a text that differs where its programs could."""

    def __init__(self, directory: Path, mesh: Mesh, made_from: str) -> None:
        self._devices = list(mesh.devices.flat)
        self._made_from = "\n".join([_installed(), _processor(), _settings(mesh), made_from])
        self._directory: Path | None = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)

    def load(self, name: Hashable) -> jax.stages.Compiled | None:
        """The program called `name`, or None where it is not kept or can not be read."""
        if self._directory is None:
            return None
        path = self._path(self._directory, name)
        try:
            stored = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s is compiled again: %s", name, error)
            return None
        digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            log.warning("%s is compiled again: %s is damaged", name, path)
            return None
        try:
            program, in_tree, out_tree = pickle.loads(content)
            return serialize_executable.deserialize_and_load(
                program, in_tree, out_tree, backend=self._devices[0].client, execution_devices=self._devices
            )
        except jax.errors.JaxRuntimeError as error:
            log.warning("%s is compiled again: XLA does not read %s: %s", name, path, error)
            return None

    def save(self, name: Hashable, program: jax.stages.Compiled) -> None:
        """Keep a program that this process compiled. One that XLA's cache gave can not be written out again."""
        if self._directory is None:
            return
        try:
            content = pickle.dumps(serialize_executable.serialize(program))
        except _NOT_WRITTEN_OUT as error:
            log.info("%s will be compiled at every start: %s", name, error)
            return
        try:
            path = self._path(self._directory, name)
            # Whole or not at all, whoever else writes it and whenever this process dies.
            with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            self._give_up(error)

    def _path(self, directory: Path, name: Hashable) -> Path:
        return directory / hashlib.sha256(f"{self._made_from}\n{name!r}".encode()).hexdigest()

    def _give_up(self, error: OSError) -> None:
        self._directory = None
        log.warning("compiled programs are not kept: %s; give another compilation_cache_dir, or False", error)


@cache
def _installed() -> str:
    """The source of this package, and the versions of what it stands on."""
    sources = hashlib.sha256()
    for root in (Path(__file__).parents[1], *map(Path, pallas_kernels.__path__)):
        for path in sorted(path for kind in ("*.py", "*.json") for path in root.rglob(kind)):
            sources.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")]
    return "\n".join([sys.version, *versions, sources.hexdigest()])


def _processor() -> str:
    """The host's processors, for whose features and number XLA's CPU code is made."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name {platform.processor()}"]  # which starts a process of its own on some systems
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([f"{os.cpu_count()} {platform.machine()}", *sorted(told)])


def _settings(mesh: Mesh) -> str:
    """What jax and XLA have been told, and the devices."""
    devices = [(device.id, device.device_kind, device.client.platform_version) for device in mesh.devices.flat]
    settings = sorted((name, value) for name, value in jax.config.values.items() if name != "jax_compilation_cache_dir")
    return repr((jax.device_count(), mesh.shape, devices, compiler_flags(), settings))
