"""`python -m serving`: a model behind gRPC and HTTP, until SIGTERM or Ctrl-C.

Requests are accepted once the model is loaded and its programs are compiled; grpc.health.v1 and /health say so. The
first SIGTERM or Ctrl-C says not serving and lets accepted requests end, the second ends the process at once. Exit
status: 0 after a drain; 1 the engine failed for good; 2 the server did not start (one line says why); 3 a defect, with
its traceback; 130 or 143 after the second signal. `--help` loads neither jax nor grpc.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jaxinfer.config import EngineConfig, tokens_from_environment
from jaxinfer.flags import OneLineParser, add_engine_flags, add_group_flags, engine_config, join_group

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group
    from serving.control import ControlConfig
    from serving.server import Server, ServerConfig

DRAINED, ENGINE_FAILED, NOT_STARTED, DEFECT = 0, 1, 2, 3

_STOP_SECONDS = 10.0
_FILES = 8192  # shells give 1024

log = logging.getLogger("serving")


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(
        prog="python -m serving",
        description="Serve a model over gRPC and HTTP.",
        epilog="Exit status: 0 stopped by a signal and drained, 1 the engine failed, 2 not started, 3 a defect.",
        allow_abbrev=False,
    )
    server = result.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    server.add_argument("--port", type=int, default=50051, metavar="N", help="gRPC; 0 is a free one (default: 50051)")
    server.add_argument(
        "--http-port", type=_port_or_off, default=8000, metavar="N", help="0 is a free one, off is none (default: 8000)"
    )
    server.add_argument("--served-model-name", metavar="NAME", help="default: the last part of --model")
    server.add_argument("--reflection", action="store_true", help="let tools such as grpcurl ask for the protocol")
    server.add_argument("--grace", type=float, default=25.0, metavar="S", help="seconds to drain in (default: 25)")
    server.add_argument("--vllm-metrics", action="store_true", help="give /metrics under vLLM's names as well")
    server.add_argument(
        "--log-format", choices=("plain", "json"), default="plain", help="of standard error (default: plain)"
    )
    server.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="collector of OpenTelemetry traces, such as http://localhost:4318/v1/traces",
    )
    security = result.add_argument_group("security")
    security.add_argument("--tls-cert", metavar="FILE", help="the server's certificate, PEM")
    security.add_argument("--tls-key", metavar="FILE", help="its key, PEM, without a password")
    security.add_argument("--tls-client-ca", metavar="FILE", help="clients must show a certificate signed by this one")
    security.add_argument(
        "--tokens-file",
        metavar="FILE",
        help="bearer tokens that may call, one a line (or JAXINFER_TOKENS, with spaces between them)",
    )
    security.add_argument("--health-needs-token", action="store_true", help="ask for a token on health checks too")
    security.add_argument(
        "--allow-anyone", action="store_true", help="let others than this machine call without token or certificate"
    )
    control = result.add_argument_group("control", "A service for whoever runs the server; it asks for tokens, too.")
    control.add_argument("--control-port", type=int, metavar="N", help="where it listens (default: nowhere)")
    control.add_argument("--profile-dir", metavar="DIR", help="where its Profile may write traces (default: nowhere)")
    control.add_argument("--load-root", metavar="DIR", help="below which its Load may read weights (default: nowhere)")
    limits = result.add_argument_group("limits")

    def limit(flag: str, metavar: str, kind: type, text: str) -> None:
        limits.add_argument(flag, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)

    limit("--max-queued-requests", "N", int, "requests beyond those that run (default: four times --max-num-seqs)")
    limit("--max-queued-tokens", "N", int, "prompt tokens waiting to be computed (default: 64 full steps)")
    limit("--max-n", "N", int, "completions of one request (default: --max-num-seqs)")
    limit("--max-items-in-flight", "N", int, "requests of one GenerateMany call at a time (default: 256)")
    limit("--max-unread-tokens", "N", int, "tokens that a stream's reader may leave unread (default: 16384)")
    limit("--stall-seconds", "S", float, "how long a reader may read nothing (default: 30)")
    limit("--max-message-bytes", "N", int, "size of a request (default: 16 MiB)")
    limit("--max-connections", "N", int, "open HTTP and gRPC connections, and gRPC calls (default: see README.md)")
    limit("--stream-pause", "S", float, "collect a stream's text so long at most, under load (default: 0.15; 0 is off)")
    limit("--step-timeout", "S", float, "a step that takes longer hangs, and the process ends (default: 120)")
    add_engine_flags(result)
    add_group_flags(result)
    return result


def _port_or_off(text: str) -> int | None:
    return None if text == "off" else int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        from serving.logs import set_up_logging

        set_up_logging(args.log_format)
        group = join_group(args, status_when_lost=ENGINE_FAILED)
    except ValueError as error:
        _tell_error(str(error))
        return NOT_STARTED
    if group is not None and group.process_id:
        from jaxinfer.distributed import follow

        logging.getLogger("jaxinfer").setLevel(logging.WARNING)  # process 0 says the same
        follow()
        return DRAINED
    status = _lead(args, group)
    if group is not None:
        group.close(status)
    return status


def allow_files() -> None:
    """Let this process have as many files open as the default limits of connections take, where it may."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _lead(args: argparse.Namespace, group: Group | None) -> int:
    """The server itself, on the only process or on process 0 of several."""
    if sys.platform != "win32":
        allow_files()
    try:
        engine = engine_config(args)
        config = _server_config(args, engine)
    except (ValueError, OSError) as error:
        _tell_error(str(error))
        return NOT_STARTED
    except ImportError as error:
        _tell_error(f"{error}; the server needs pip install 'jaxinfer[serve]'")
        return NOT_STARTED
    try:
        return asyncio.run(_serve(config, engine, group))
    except Exception:
        traceback.print_exc()
        _tell_error("this is a defect of jaxinfer; the lines above say where")
        return DEFECT


def _server_config(args: argparse.Namespace, engine: EngineConfig) -> ServerConfig:
    """The flags, checked. ValueError for those that contradict each other, before anything is loaded."""
    from serving.security import TlsFiles, is_loopback, read_tokens
    from serving.server import ServerConfig
    from serving.settings import Limits
    from serving.tracing import otlp_exporter

    for flag, port in (("--port", args.port), ("--http-port", args.http_port)):
        if port is not None and not 0 <= port <= 65535:
            raise ValueError(f"{flag} {port} is out of range; use a value in [0, 65535]")
    if args.port == args.http_port != 0:
        raise ValueError(f"--port and --http-port are both {args.port}; give each its own")
    if not 0 <= args.grace < float("inf"):
        raise ValueError(f"--grace {args.grace} must be 0 or more seconds")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise ValueError("--tls-cert and --tls-key go together; give both")
    if args.tls_client_ca is not None and args.tls_cert is None:
        raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
    tls = None
    if args.tls_cert is not None:
        tls = TlsFiles(args.tls_cert, args.tls_key, args.tls_client_ca)
        tls.credentials()
    tokens = read_tokens(args.tokens_file, tokens_from_environment())
    if args.health_needs_token and tokens is None:
        raise ValueError("--health-needs-token needs tokens; give --tokens-file")
    if not is_loopback(args.host):
        if tokens is None and args.tls_client_ca is None and not args.allow_anyone:
            raise ValueError(
                f"--host {args.host} lets other machines call, and nothing says who may; give --tokens-file or "
                f"--tls-client-ca, or --allow-anyone"
            )
        if tokens is not None and tls is None:
            log.warning("tokens are sent in the clear to %s; give --tls-cert and --tls-key", args.host)
    control = _control_config(args)
    if control is not None and not is_loopback(args.host) and tokens is None and args.tls_client_ca is None:
        raise ValueError(f"--control-port on --host {args.host} needs --tokens-file or --tls-client-ca")
    given = {name: value for name, value in vars(args).items() if name in Limits.__dataclass_fields__}
    return ServerConfig(
        name=args.served_model_name or os.path.basename(os.path.normpath(engine.model)),
        host=args.host,
        port=args.port,
        http_port=args.http_port,
        tls=tls,
        tokens=tokens,
        health_is_open=not args.health_needs_token,
        grace=args.grace,
        limits=Limits(**given),
        vllm_metrics=args.vllm_metrics,
        control=control,
        reflection=args.reflection,
        spans=None if args.otlp_endpoint is None else otlp_exporter(args.otlp_endpoint),
    )


def _control_config(args: argparse.Namespace) -> ControlConfig | None:
    from serving.control import ControlConfig

    if args.control_port is None:
        for flag in ("profile_dir", "load_root"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} needs --control-port")
        return None
    if args.load_root is not None and args.coordinator is not None:
        raise ValueError("--load-root swaps the weights of one process, not of several; leave it out")
    if not 0 <= args.control_port <= 65535:
        raise ValueError(f"--control-port {args.control_port} is out of range; use a value in [0, 65535]")
    profile = None if args.profile_dir is None else Path(args.profile_dir).absolute()
    root = None if args.load_root is None else Path(args.load_root).absolute()
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    if root is not None and not root.is_dir():
        raise ValueError(f"--load-root {root} is no directory")
    return ControlConfig(args.control_port, profile, root)


async def _serve(config: ServerConfig, engine: EngineConfig, group: Group | None) -> int:
    from jaxinfer.run import open_engine
    from serving.server import Server, settle

    signals: asyncio.Queue[int] = asyncio.Queue()
    stopped = asyncio.create_task(_first(signals))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    server = Server(config, lambda: open_engine(engine))
    if group is not None:
        loop = asyncio.get_running_loop()
        group.on_asked = lambda: loop.call_soon_threadsafe(server.ask_to_stop)
    try:
        await server.listen()
    except ValueError as error:
        _tell_error(str(error))
        return NOT_STARTED
    http = "" if server.http is None else f", HTTP on port {server.http.port}"
    log.info("listening on %s port %d%s; loading %s", config.host, server.port, http, engine.model)
    loaded = asyncio.create_task(server.load())
    asked = asyncio.create_task(server.wait_until_asked_to_stop())
    await asyncio.wait((loaded, stopped, asked), return_when=asyncio.FIRST_COMPLETED)
    if not loaded.done():
        log.info("stopped before the model was loaded")
        _end_now(DRAINED)  # loading and compiling cannot be interrupted, and nobody was promised anything
    try:
        await loaded
    except (ValueError, OSError) as error:
        _tell_error(str(error))
        _end_now(NOT_STARTED)
    settle()
    log.info("%s is ready on port %d%s", config.name, server.port, http)
    if server.control_port:
        log.info("control on port %d", server.control_port)
    dead = asyncio.create_task(server.wait_until_dead())
    await asyncio.wait((stopped, asked, dead), return_when=asyncio.FIRST_COMPLETED)
    return await _finish(server, signals, is_dead=dead.done())


async def _finish(server: Server, signals: asyncio.Queue[int], is_dead: bool) -> int:
    from serving.engine_loop import StepTimeout

    if not is_dead:
        log.info("draining, %g s at most; a second signal ends at once", server.config.grace)
    second = asyncio.create_task(_first(signals))
    ending = asyncio.create_task(_drain_and_stop(server))
    await asyncio.wait((second, ending), return_when=asyncio.FIRST_COMPLETED)
    if not ending.done():
        _end_now(128 + second.result())
    await ending
    if is_dead or server.frontend.dead.is_set():
        cause = server.frontend.cause_of_death
        if isinstance(cause, StepTimeout):
            _tell_error(f"{cause}; the device hangs, and what it was given is lost")
            _end_now(ENGINE_FAILED)  # the engine's thread will never let the interpreter end
        _tell_error("the engine failed for good; the lines above say why")
        return ENGINE_FAILED
    log.info("stopped")
    return DRAINED


async def _drain_and_stop(server: Server) -> None:
    await server.drain()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await server.stop()
    except TimeoutError:
        log.error("the engine's thread does not answer")
        _end_now(ENGINE_FAILED)


async def _first(signals: asyncio.Queue[int]) -> int:
    return await signals.get()


def _end_now(status: int) -> NoReturn:
    """Without the interpreter's own farewell, which waits for threads and breaks in the middle of a compilation."""
    from jaxinfer.distributed.group import current

    if (group := current()) is not None:
        group.leave(status)
    sys.stderr.flush()
    os._exit(status)


def _tell_error(message: str) -> None:
    """One line, whatever a library put into the message."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
