"""Who may call, and over what: bearer tokens, TLS certificates. Imports no jax."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc

from serving import health
from serving.refusals import Refusals

MIN_TOKEN_CHARACTERS = 16
NO_TOKEN = "send one of the server's tokens: authorization: Bearer TOKEN"


class Tokens:
    """The bearer tokens that may call. Only their digests are kept, so that no log or traceback can show one."""

    def __init__(self, tokens: list[str]) -> None:
        self._digests = [_digest(token) for token in tokens]

    def accept(self, header: str) -> bool:
        """Whether an Authorization header holds one of them. Takes the same time whichever it is, and if none is."""
        scheme, _, token = header.partition(" ")
        digest, found = _digest(token.strip()), False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == "bearer"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def read_tokens(file: str | None, from_environment: str) -> Tokens | None:
    """The tokens of a file, one a line (# starts a comment), or those of the environment; None where there are none.

    ValueError for a file without tokens, and for tokens that are short or not made of plain characters.
    """
    if file is not None:
        lines = [line.strip() for line in Path(file).read_text().splitlines()]
        tokens = [line for line in lines if line and not line.startswith("#")]
        source = f"{file}"
        if not tokens:
            raise ValueError(f"{file} holds no token; write one a line")
    else:
        tokens, source = from_environment.split(), "JAXINFER_TOKENS"
        if not tokens:
            return None
    for number, token in enumerate(tokens, start=1):
        # The token itself is not shown: messages end up in logs.
        if len(token) < MIN_TOKEN_CHARACTERS:
            raise ValueError(
                f"token {number} of {source} is shorter than {MIN_TOKEN_CHARACTERS} characters; make it longer"
            )
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError(
                f"token {number} of {source} has spaces or other than plain characters; use letters and digits"
            )
    return Tokens(tokens)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. client_ca: who must have signed a client's certificate, where clients have to show one."""

    certificate: str
    key: str
    client_ca: str | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTP. ValueError, in one line, for files that do not hold what they should or do not go together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except ssl.SSLError as error:
            raise ValueError(
                f"{self.certificate} and {self.key} are no certificate and its key in PEM ({error.reason})"
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"{self.client_ca} is no certificate in PEM ({error.reason})") from error
            context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["http/1.1"])
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which does not say what is wrong with a file: `context` is asked first."""
        self.context()
        ca = None if self.client_ca is None else Path(self.client_ca).read_bytes()
        pair = Path(self.key).read_bytes(), Path(self.certificate).read_bytes()
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _no_password() -> str:
    raise ValueError("the TLS key is encrypted; give one without a password, readable by this user alone")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses every method, known or not, without one of the tokens; health by choice."""

    def __init__(self, tokens: Tokens, health_is_open: bool, refusals: Refusals) -> None:
        self._tokens = tokens
        self._health_is_open = health_is_open
        self._refusals = refusals

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Called by gRPC before each call."""
        call: Any = handler_call_details
        if self._health_is_open and call.method.startswith(health.PREFIX):
            return await continuation(handler_call_details)
        headers = [value for key, value in call.invocation_metadata if key == "authorization"]
        if len(headers) == 1 and self._tokens.accept(headers[0]):
            return await continuation(handler_call_details)

        async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
            self._refusals.note("UNAUTHENTICATED", NO_TOKEN, caller=context.peer(), call=call.method)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_TOKEN)

        return grpc.stream_stream_rpc_method_handler(refuse)  # one that reads nothing refuses calls of any kind
