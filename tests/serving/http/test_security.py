"""Who may call what, under which name, how much, and over which certificates."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from jaxinfer.engine import Engine
from serving import messages
from serving.__main__ import main
from serving.client import AsyncClient
from serving.http import reading
from serving.security import TlsFiles, Tokens
from serving.settings import Limits
from tests.serving.harness import address, run, until
from tests.serving.http.harness import http_serving, url

GOOD, OTHER = "a-token-of-some-length", "another-token-of-length"
BODY = {"model": "small", "prompt": "x", "max_tokens": 1}
ROUTES = (
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/small"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/nowhere"),
    ("POST", "/health"),
    ("POST", "/"),
    ("OPTIONS", "/v1/completions"),
    ("GET", "/health/"),
    ("GET", "/%2e/health"),
)


@pytest.mark.parametrize("header", [None, f"Bearer {GOOD}x", "Bearer", f"Basic {GOOD}", GOOD])
def test_nothing_without_a_token(engine: Engine, header: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Every method and path, known or not; health and the page's two files alone are open."""

    async def scenario() -> None:
        async with http_serving(engine, tokens=Tokens([GOOD, OTHER])) as (_, client):
            headers = {} if header is None else {"authorization": header}
            for method, path in ROUTES:
                response = await client.request(method, path, headers=headers)
                assert response.status_code == 401, (method, path)
                assert response.json()["error"]["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/health", "/", "/page.js"):
                assert (await client.get(path, headers=headers)).status_code == 200
            twice = [("authorization", f"Bearer {GOOD}"), ("authorization", f"Bearer {OTHER}")]
            assert (await client.get("/v1/models", headers=twice)).status_code == 401
            for token in (GOOD, OTHER):
                known = {"authorization": f"Bearer {token}"}
                assert (await client.post("/v1/completions", json=BODY, headers=known)).status_code == 200
        assert GOOD not in caplog.text

    with caplog.at_level("DEBUG", logger="serving"):
        run(scenario())


def test_health_can_need_a_token_too(engine: Engine) -> None:
    async def scenario() -> None:
        async with http_serving(engine, tokens=Tokens([GOOD]), health_is_open=False) as (_, client):
            assert (await client.get("/health")).status_code == 401
            assert (await client.get("/health", headers={"authorization": f"Bearer {GOOD}"})).status_code == 200

    run(scenario())


def test_other_sites_pages_get_nowhere(engine: Engine) -> None:
    """No other name for this machine (DNS rebinding), no form's content type, no permission to scripts of elsewhere."""

    async def scenario() -> None:
        async with http_serving(engine) as (server, client):
            assert server.http is not None
            for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""):
                response = await client.get("/v1/models", headers={"host": host})
                assert response.status_code == 403, host
                assert response.json()["error"]["type"] == "permission_error"
            for host in ("localhost", f"LOCALHOST:{server.http.port}", "127.0.0.1:1", "[::1]:8000", "[::1]"):
                assert (await client.get("/v1/models", headers={"host": host})).status_code == 200, host
            for media in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
                response = await client.post(
                    "/v1/completions", content=json.dumps(BODY), headers={"content-type": media}
                )
                assert response.status_code == 415, media
            asking = {"origin": "https://evil.example", "access-control-request-method": "POST"}
            response = await client.options("/v1/completions", headers=asking)
            assert response.status_code == 405
            read = await client.get("/v1/models", headers={"origin": "https://evil.example"})
            assert not [name for name in (*response.headers, *read.headers) if name.startswith("access-control")]
            page = await client.get("/")
            assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        async with http_serving(engine, tokens=Tokens([GOOD])) as (_, client):
            known = {"authorization": f"Bearer {GOOD}", "host": "models.example"}
            assert (await client.get("/v1/models", headers=known)).status_code == 200

    run(scenario())


def test_size_of_bodies(engine: Engine) -> None:
    async def scenario() -> None:
        async with http_serving(engine, Limits(max_message_bytes=1024)) as (_, client):

            async def pieces() -> Any:
                for _ in range(100):
                    yield b" " * 100

            media = {"content-type": "application/json"}
            for path in ("/v1/completions", "/tokenize"):
                for content in (b" " * 1025, b" " * 2**20, pieces()):
                    response = await client.post(path, content=content, headers=media)
                    assert response.status_code == 413, path
                    assert "1024 bytes" in response.json()["error"]["message"]
            exact = json.dumps(BODY).encode().ljust(1024)
            assert (await client.post("/v1/completions", content=exact, headers=media)).status_code == 200
            gzipped = {**media, "content-encoding": "gzip"}
            assert (await client.post("/v1/completions", content=b"x", headers=gzipped)).status_code == 415

    run(scenario())


def test_a_large_message_keeps_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is understood, which takes as long as this test likes, others are answered."""
    has_begun, is_allowed = threading.Event(), threading.Event()

    def held(read: Any) -> Any:
        def wait(message: Any) -> Any:
            has_begun.set()
            assert is_allowed.wait(20)
            return read(message)

        return wait

    async def scenario() -> None:
        async with http_serving(engine) as (server, web), AsyncClient(address(server)) as rpc:
            monkeypatch.setattr(reading, "parse_object", held(reading.parse_object))
            monkeypatch.setattr(messages, "read_ask", held(messages.read_ask))
            large = asyncio.create_task(web.post("/v1/completions", json={**BODY, "user": "u" * 100_000}))
            await until(has_begun.is_set)
            other = asyncio.create_task(rpc.generate("x", cache_salt="s" * 100_000, max_tokens=1, ignore_eos=True))
            assert (await web.get("/health")).status_code == 200
            assert len(await rpc.models()) == 1
            is_allowed.set()
            assert (await large).status_code == 200
            assert (await other).completions[0].finish_reason == "length"

    run(scenario())


def test_too_many_connections(engine: Engine) -> None:
    """One too many is told so, many too many are cut, and health is answered on any; once some close, all is well."""

    async def scenario() -> None:
        async with http_serving(engine, Limits(max_connections=2)) as (server, client):
            assert server.http is not None
            idle = [await asyncio.open_connection("localhost", server.http.port) for _ in range(2)]
            response = await client.get("/v1/models")
            assert response.status_code == 503
            assert "3 connections are open, and the server takes 2" in response.json()["error"]["message"]
            assert response.headers["retry-after"] == "1"
            assert (await client.get("/health")).status_code == 200
            idle += [await asyncio.open_connection("localhost", server.http.port) for _ in range(2)]
            reader, _ = idle[-1]
            assert await reader.read() == b""
            for _, writer in idle:
                writer.close()
            await until(lambda: len(server.http._server.server_state.connections) < 2)
            assert (await client.get("/v1/models")).status_code == 200

    run(scenario())


def test_connections_in_the_handshake_are_counted(engine: Engine, tmp_path: Path) -> None:
    leaf = trustme.CA().issue_cert("localhost")
    leaf.private_key_pem.write_to_path(tmp_path / "key.pem")
    leaf.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")

    async def scenario() -> None:
        tls = TlsFiles(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
        async with http_serving(engine, Limits(max_connections=2), tls=tls) as (server, _):
            assert server.http is not None
            silent = [await asyncio.open_connection("localhost", server.http.port) for _ in range(4)]
            reader, writer = await asyncio.open_connection("localhost", server.http.port)
            assert await reader.read() == b""
            for _, one in (*silent, (reader, writer)):
                one.close()
            patient = httpx.AsyncHTTPTransport(verify=False, retries=5)
            async with httpx.AsyncClient(base_url=url(server), transport=patient) as client:
                assert (await client.get("/health")).status_code == 200

    run(scenario())


def test_tls_and_mutual_tls(engine: Engine, tmp_path: Path) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    files = {}
    leaf, own = ca.issue_cert("localhost"), ca.issue_cert("client@example.org")
    ca.cert_pem.write_to_path(files.setdefault("ca", str(tmp_path / "ca.pem")))
    leaf.private_key_pem.write_to_path(files.setdefault("key", str(tmp_path / "key.pem")))
    leaf.cert_chain_pems[0].write_to_path(files.setdefault("cert", str(tmp_path / "cert.pem")))

    def context(issuer: trustme.CA, certificate: trustme.LeafCert | None = None) -> ssl.SSLContext:
        result = ssl.create_default_context()
        issuer.configure_trust(result)
        if certificate is not None:
            certificate.configure_cert(result)
        return result

    async def scenario() -> None:
        for client_ca in (None, files["ca"]):
            tls = TlsFiles(files["cert"], files["key"], client_ca)
            async with http_serving(engine, tls=tls) as (server, _):
                for trusted, certificate, answered in (
                    (ca, own, True),
                    (ca, None, client_ca is None),
                    (ca, stranger.issue_cert("client@example.org"), client_ca is None),
                    (stranger, own, False),
                ):
                    async with httpx.AsyncClient(verify=context(trusted, certificate)) as client:
                        if answered:
                            assert (await client.get(f"{url(server)}/v1/models")).status_code == 200
                        else:
                            with pytest.raises(httpx.TransportError):
                                await client.get(f"{url(server)}/v1/models")
                async with httpx.AsyncClient() as client:
                    with pytest.raises(httpx.TransportError):
                        await client.get(url(server).replace("https", "http") + "/health")

    run(scenario())


def test_flags_of_http(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXINFER_TOKENS", raising=False)
    for flags, words in ((["--http-port", "65536"], "--http-port"), (["--port", "8000"], "both 8000")):
        assert main(flags) == 2, flags
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line


def test_port_that_is_taken(engine: Engine) -> None:
    async def scenario() -> None:
        from serving.server import Server, ServerConfig

        async with http_serving(engine) as (server, _):
            assert server.http is not None
            other = Server(ServerConfig("other", port=0, http_port=server.http.port), lambda: engine)
            with pytest.raises(ValueError, match="choose another --http-port"):
                await other.listen()
            other = Server(ServerConfig("other", port=server.port, http_port=0), lambda: engine)
            with pytest.raises(ValueError, match=f"{server.port}; is the port taken"):
                await other.listen()

    run(scenario())


def test_every_status_has_its_own() -> None:
    from typing import get_args

    from serving.errors import Code
    from serving.http.errors import STATUSES

    assert STATUSES.keys() == set(get_args(Code))
