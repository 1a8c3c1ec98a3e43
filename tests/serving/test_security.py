"""Tokens, certificates, and flags that would leave the door open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2

from jaxinfer.engine import Engine
from serving.__main__ import main
from serving.client import AsyncClient
from serving.security import TlsFiles, Tokens, is_loopback, read_tokens
from tests.serving.harness import address, collect, connected, refused, run, serving

PROMPT = "one small prompt"
GOOD, OTHER = "a-token-of-some-length", "another-token-of-length"


@pytest.mark.parametrize("token", [None, "wrong-token-of-length", GOOD[:-1], GOOD + "x", ""])
def test_nothing_but_health_without_a_token(engine: Engine, token: str | None) -> None:
    async def scenario() -> None:
        async with serving(engine, tokens=Tokens([GOOD, OTHER])) as server:
            async with AsyncClient(address(server), token=token, max_tries=1) as client:
                assert await client.is_serving()
                for call in (
                    client.generate(PROMPT),
                    collect(client.stream(PROMPT)),
                    client._inference.GenerateMany().read(),
                    client.models(),
                    client.tokenize("x"),
                    client.detokenize([3]),
                    client._channel.unary_unary("/jaxinfer.v1.Secret/Method")(b""),
                    client._channel.unary_unary("/grpc.health.v2.Health/Check")(b""),
                ):
                    error = await refused(call, "UNAUTHENTICATED", "authorization")
                    assert GOOD not in str(error)
            for good in (GOOD, OTHER):
                async with AsyncClient(address(server), token=good, max_tries=1) as client:
                    assert (await client.generate(PROMPT, max_tokens=1)).usage is not None

    run(scenario())


def test_health_can_need_a_token_too(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine, tokens=Tokens([GOOD]), health_is_open=False) as server:
            async with AsyncClient(address(server)) as client:
                await refused(client.is_serving(), "UNAUTHENTICATED")
                await refused(client._health.Watch(health_pb2.HealthCheckRequest()).read(), "UNAUTHENTICATED")
            async with AsyncClient(address(server), token=GOOD) as client:
                assert await client.is_serving()

    run(scenario())


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        (f"Bearer {GOOD}", True),
        (f"bearer {GOOD}", True),
        (f"Basic {GOOD}", False),
        (GOOD, False),
        ("Bearer ", False),
        ("Bearer \udcff", False),
    ],
)
def test_authorization_headers(header: str, accepted: bool) -> None:
    assert Tokens([GOOD]).accept(header) == accepted


def test_token_sources(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# for the front end\n{GOOD}\n\n  {OTHER}  \n")
    tokens = read_tokens(str(file), "")
    assert tokens is not None
    assert tokens.accept(f"Bearer {OTHER}")
    from_environment = read_tokens(None, f"{GOOD} {OTHER}")
    assert from_environment is not None
    assert from_environment.accept(f"Bearer {GOOD}")
    assert read_tokens(None, "") is None
    for text, words in (
        ("# nothing\n", "holds no token"),
        ("short\n", "shorter than 16"),
        ("x" * 20 + " y\n", "spaces"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_tokens(str(file), "")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of a CA, the server's and a client's certificate, and those of a stranger."""
    directory = tmp_path_factory.mktemp("certificates")
    files = {}
    for name, ca in (("", trustme.CA()), ("stranger_", trustme.CA())):
        ca.cert_pem.write_to_path(files.setdefault(f"{name}ca", str(directory / f"{name}ca.pem")))
        for who in ("localhost", "client@example.org"):
            leaf, key = ca.issue_cert(who), name + who.partition("@")[0]
            leaf.private_key_pem.write_to_path(files.setdefault(f"{key}_key", str(directory / f"{key}.key")))
            leaf.cert_chain_pems[0].write_to_path(files.setdefault(f"{key}_cert", str(directory / f"{key}.pem")))
    return files


def test_tls(engine: Engine, certificates: dict[str, str]) -> None:
    async def scenario() -> None:
        tls = TlsFiles(certificates["localhost_cert"], certificates["localhost_key"])
        async with serving(engine, tls=tls, tokens=Tokens([GOOD])) as server:
            where: dict[str, Any] = {"address": address(server), "token": GOOD, "max_tries": 1, "timeout": 10}
            async with AsyncClient(tls=certificates["ca"], **where) as client:
                assert (await client.generate(PROMPT, max_tokens=1)).usage is not None
            for tls_of_client in (False, certificates["stranger_ca"]):
                async with AsyncClient(tls=tls_of_client, **where) as client:
                    await refused(client.generate(PROMPT), "UNAVAILABLE")

    run(scenario())


def test_mutual_tls(engine: Engine, certificates: dict[str, str]) -> None:
    async def scenario() -> None:
        tls = TlsFiles(certificates["localhost_cert"], certificates["localhost_key"], certificates["ca"])
        async with serving(engine, tls=tls) as server:
            for name, is_known in (("client", True), ("stranger_client", False), (None, False)):
                pair = {} if name is None else {k: certificates[f"{name}_{k[:4]}"] for k in ("certificate", "key")}
                where = address(server)
                async with AsyncClient(where, tls=certificates["ca"], max_tries=1, timeout=10, **pair) as client:
                    if is_known:
                        assert (await client.generate(PROMPT, max_tokens=1)).usage is not None
                    else:
                        await refused(client.generate(PROMPT), "UNAVAILABLE")

    run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_bad_flags_are_one_line(
    tmp_path: Path, certificates: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXINFER_TOKENS", raising=False)
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    cert, key = certificates["localhost_cert"], certificates["localhost_key"]
    for flags, words in (
        (["--host", "0.0.0.0"], "--tokens-file"),
        (["--port", "65536"], "[0, 65535]"),
        (["--grace", "-1"], "--grace"),
        (["--tls-cert", cert], "--tls-key"),
        (["--tls-client-ca", cert], "--tls-cert"),
        (["--tls-cert", cert, "--tls-key", str(nonsense)], "nonsense.pem"),
        (["--tls-cert", cert, "--tls-key", certificates["client_key"]], "certificate and its key"),
        (["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", str(nonsense)], "nonsense.pem"),
        (["--tls-cert", str(tmp_path / "none"), "--tls-key", key], "No such file"),
        (["--tokens-file", str(tmp_path / "none")], "No such file"),
        (["--health-needs-token"], "--tokens-file"),
        (["--max-n", "0"], "max_n=0"),
        (["--stall-seconds", "nan"], "stall_seconds"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
    ):
        assert main(flags) == 2, flags
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), line
        assert words in line, line


def test_port_that_is_taken(engine: Engine) -> None:
    async def scenario() -> None:
        from serving.server import Server, ServerConfig

        async with connected(engine) as (server, _):
            with pytest.raises(ValueError, match=f"{server.port}; is the port taken"):
                await Server(ServerConfig("other", port=server.port), lambda: engine).listen()

    run(scenario())


def test_statuses_are_grpcs_own() -> None:
    from typing import get_args

    from serving.errors import Code

    assert {code.name for code in grpc.StatusCode} >= set(get_args(Code))
