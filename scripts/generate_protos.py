"""Make serving/generated/ from protos/: `python scripts/generate_protos.py`, or `--check` to compare only.

The compiler runs in a virtual environment of its own under a temporary directory. Its version is the newest whose
output both protobuf 6 and protobuf 7 import: code made by protobuf 6.33 is served by runtimes of 6.33 and later and of
the next major version, and grpcio-health-checking needs protobuf 7 in its newer releases where other clients need 6.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos"
GENERATED = ROOT / "serving" / "generated"
COMPILER = "grpcio-tools==1.81.1"
MARK = "# Made by scripts/generate_protos.py from {source}, sha256 {digest}\n"

# protoc names Python modules after the .proto's path, and `jaxinfer` is a package of its own.
_IMPORT = re.compile(r"^from (jaxinfer\.v1|inference) import ", re.MULTILINE)
# The names of another's protocol are registered by its clients too, and a pool holds a name once: ours get their own,
# so that server and client can live in one process.
_FOREIGN = "inference"
_POOL, _OWN_POOL = "_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()"


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def generate() -> dict[str, str]:
    """File name to content, for every file of serving/generated but its __init__.py."""
    sources = sorted(PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as directory:
        environment, out = Path(directory) / "venv", Path(directory) / "out"
        out.mkdir()
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", COMPILER], check=True)
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        subprocess.run([python, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *sources], check=True)
        by_stem = {source.stem: source for source in sources}
        files = {}
        for path in sorted(out.rglob("*.py*")):
            source = by_stem[re.sub(r"_pb2(_grpc)?$", "", path.stem)]
            mark = MARK.format(source=source.relative_to(ROOT), digest=digest(source))
            text = _IMPORT.sub("from serving.generated import ", path.read_text())
            if source.parent.name == _FOREIGN:
                text = text.replace(_POOL, _OWN_POOL)
            files[path.name] = mark + text
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description="Make serving/generated/ from protos/.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the files differ")
    check = parser.parse_args().check
    files = generate()
    stale = {path.name for path in GENERATED.glob("*_pb2*") if path.suffix in (".py", ".pyi")} - files.keys()
    different = [name for name, text in files.items() if _read(GENERATED / name) != text]
    if check:
        for name in sorted({*different, *stale}):
            print(f"serving/generated/{name} is not what protos/ gives; run scripts/generate_protos.py")
        return int(bool(different or stale))
    for name in stale:
        (GENERATED / name).unlink()
    for name, text in files.items():
        (GENERATED / name).write_text(text)
    print(f"{len(files)} files in {GENERATED.relative_to(ROOT)}, {len(different)} of them changed")
    return 0


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
