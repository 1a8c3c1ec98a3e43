"""Imports point one way, host-only modules import no jax, starting is quick: rules of ARCHITECTURE.md, held here."""

from __future__ import annotations

import ast
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down. A module imports from its own room, and from rooms in the lines below its own; never from another
# room in its own line (except in the last but one, whose rooms are small and plain). The longest name that fits counts.
TIERS: tuple[tuple[str, ...], ...] = (
    ("jaxinfer.__main__",),
    ("serving",),
    ("jaxinfer.run", "jaxinfer.convert"),
    ("jaxinfer.batchjob", "jaxinfer.flags"),
    ("jaxinfer.openai",),
    ("jaxinfer", "jaxinfer.llm"),
    ("jaxinfer.engine",),
    ("jaxinfer.distributed",),
    ("jaxinfer.loading",),
    ("jaxinfer.runner",),
    ("jaxinfer.outputs",),
    ("jaxinfer.scheduler", "jaxinfer.tokenizer", "jaxinfer.checkpoint"),
    ("jaxinfer.cache",),
    ("jaxinfer.plan",),
    ("jaxinfer.models", "jaxinfer.sampling", "jaxinfer.speculative"),
    ("jaxinfer.layers",),
    ("jaxinfer.ops",),
    ("jaxinfer.cache.groups",),
    (
        "jaxinfer.types",
        "jaxinfer.config",
        "jaxinfer.sharding",
        "jaxinfer.quantization",
        "jaxinfer.metrics",
        "jaxinfer.models.config",
        "jaxinfer.distributed.group",
        "jaxinfer.distributed.lead",
        "jaxinfer.distributed.link",
        "jaxinfer.compat",
    ),
    ("pallas_kernels",),
)
LEAVES = len(TIERS) - 2

# Modules that --help, a front end or a scheduler test loads: no jax, not even through others. A module whose docstring
# says so is held to it as well.
HOST_ONLY = (
    "jaxinfer",
    "jaxinfer.__main__",
    "jaxinfer.batchjob*",
    "jaxinfer.cache.groups",
    "jaxinfer.cache.manager",
    "jaxinfer.cache.pages",
    "jaxinfer.cache.prefix",
    "jaxinfer.config",
    "jaxinfer.distributed",
    "jaxinfer.distributed.group",
    "jaxinfer.distributed.lead",
    "jaxinfer.distributed.link",
    "jaxinfer.flags",
    "jaxinfer.metrics*",
    "jaxinfer.models.config",
    "jaxinfer.models.families*",
    "jaxinfer.openai*",
    "jaxinfer.run",
    "jaxinfer.scheduler*",
    "jaxinfer.tokenizer*",
    "jaxinfer.types",
    "serving*",
)
SAYS_SO = "imports no jax"


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages, by dotted name."""
    found = {}
    for package in ("jaxinfer", "pallas_kernels", "serving"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(), str(modules()[name]))


def imported(name: str, nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import among the nodes; `from package import module` names the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write imports in full"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules() else node.module), node.lineno


def room(name: str) -> tuple[int, str]:
    """(tier, the entry of TIERS it belongs to)."""
    entries = ((tier, entry) for tier, line in enumerate(TIERS) for entry in line)
    fitting = [(tier, entry) for tier, entry in entries if name == entry or name.startswith(entry + ".")]
    return max(fitting, key=lambda found: len(found[1]))


def problems(name: str, target: str, line: int) -> Iterator[str]:
    (tier, own), (target_tier, other) = room(name), room(target)
    if own == other or target_tier > tier or (tier == target_tier == LEAVES):
        return
    where = "is above it" if target_tier < tier else "stands beside it"
    yield f"{modules()[name].relative_to(ROOT)}:{line} imports {target}, but {other} {where} (TIERS in {__file__})"


def test_imports_point_one_way() -> None:
    found = []
    for name in modules():
        if name == "jaxinfer":
            continue  # hands out names of the others, on first use
        # Imports inside functions and for type checkers alone count too: a picture that holds only at run time is none.
        for target, line in imported(name, ast.walk(tree(name))):
            if target.split(".")[0] in ("jaxinfer", "pallas_kernels", "serving"):
                found += problems(name, target, line)
    assert not found, "\n".join(found)


def test_every_room_has_its_place() -> None:
    strays = [name for name in modules() if name.startswith("jaxinfer.") and room(name)[1] == "jaxinfer"]
    assert not strays, f"give these a line in TIERS: {strays}"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("jaxinfer.scheduler.scheduler", "jaxinfer.engine"),
        ("jaxinfer.scheduler.scheduler", "jaxinfer.tokenizer"),
        ("jaxinfer.metrics.table", "jaxinfer.outputs"),
        ("jaxinfer.cache.groups", "jaxinfer.cache.manager"),
    ],
)
def test_wrong_directions_would_be_found(name: str, target: str) -> None:
    assert list(problems(name, target, 1))
    assert not list(problems("jaxinfer.engine", name, 1))


def test_no_two_modules_need_each_other() -> None:
    """No cycle among the imports that run when a module is loaded."""
    graph = {
        name: {target for target, _ in imported(name, _at_load(tree(name).body)) if target in modules()} - {name}
        for name in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def _at_load(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _at_load(getattr(node, part, []))


def host_only_modules() -> list[str]:
    return [
        name
        for name in modules()
        if any(fnmatch.fnmatch(name, pattern) for pattern in HOST_ONLY)
        or SAYS_SO in (ast.get_docstring(tree(name)) or "").lower()
    ]


def _run(code: str, *args: str) -> str:
    command = [sys.executable, "-c", code, *args]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_host_only_modules_import_no_jax() -> None:
    names = host_only_modules()
    assert len(names) > 20
    code = """
import importlib, sys
class NoJax:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "torch"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, NoJax())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except AssertionError as error:
        sys.exit(f"{name}: {error}")
"""
    _run(code, *names)


HEAVY = {"jax", "jaxlib", "flax", "numpy", "transformers", "safetensors", "orbax", "huggingface_hub", "tqdm", "torch"}
HEAVY |= {"grpc", "google", "starlette", "uvicorn", "prometheus_client"}


@pytest.mark.parametrize(
    "code",
    [
        "import jaxinfer",
        "import jaxinfer.run; jaxinfer.run.parser().format_help()",
        "import jaxinfer.__main__; jaxinfer.__main__.main(['--help'])",
        "import serving.__main__; serving.__main__.parser().format_help()",
        "import jaxinfer.config; jaxinfer.config.EngineConfig('x')",
    ],
)
def test_starting_loads_little(code: str) -> None:
    """Counted in modules, which unlike seconds do not depend on what else the machine does."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(_run(script).splitlines()[-1])
    assert not HEAVY & {name.split(".")[0] for name in loaded}
    assert len(loaded) < 250


def test_only_config_reads_the_environment() -> None:
    """Others may set a variable for a library they are about to import, with os.environ.setdefault."""
    readers = set()
    for name in modules():
        nodes = list(ast.walk(tree(name)))
        setting = {n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr == "setdefault"}
        reading = {n for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("environ", "environb", "getenv")}
        if reading - setting:
            readers.add(name)
    assert readers == {"jaxinfer.config"}


def test_private_jax_lives_in_one_file_and_torch_nowhere() -> None:
    for name in modules():
        for target, line in imported(name, ast.walk(tree(name))):
            where = f"{modules()[name].relative_to(ROOT)}:{line} imports {target}"
            assert target.split(".")[0] != "torch", where
            assert "._src" not in target or name == "jaxinfer.compat", where
