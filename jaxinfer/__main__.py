"""The `jaxinfer` command: `jaxinfer run ...`, `jaxinfer serve ...` and `jaxinfer convert ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """usage: jaxinfer {run,serve,convert} ...

  run      complete a file of prompts, or one prompt    (python -m jaxinfer.run)
  serve    answer requests over HTTP and gRPC           (python -m serving)
  convert  turn a checkpoint into another format        (python -m jaxinfer.convert)

jaxinfer COMMAND --help tells a command's flags; jaxinfer --version the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to a command; returns its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    command, rest = (args[0], args[1:]) if args else ("", [])
    if command == "run":
        from jaxinfer.run import main as run

        return run(rest)
    if command == "serve":
        from serving.__main__ import main as serve

        return serve(rest)
    if command == "convert":
        from jaxinfer.convert import main as convert

        return convert(rest)
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(f"jaxinfer {version('jaxinfer')}")
        return 0
    what = f"{command!r} is not a command" if command else "no command"
    print(f"error: {what}; use run, serve or convert (see jaxinfer --help)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
