"""Tests which certificates are accepted, the messages about the others, and proxies."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from microsandbox import ServerUnreachableError, UnexpectedAnswerError, _http
from microsandbox._config import Config

from ..flavours import done, entered
from .stub import TEST_KEY, Reply, Server

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls_server(server: Server, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the server speak TLS with a certificate for localhost. Returns its URL with %s for the host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    plain = server.socket
    server.socket = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)  # ignores handshakes that the client aborts
    port = server.server_address[1]
    monkeypatch.delenv("MSB_SERVER_URL")
    yield f"https://%s:{port}"
    server.socket.close()


def trust(authority: trustme.CA, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(directory / "ca.pem"))


async def test_private_authority(
    api: Any, tls_server: str, authority: trustme.CA, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(authority, nowhere, monkeypatch)
    async with entered(api.PythonSandbox.create(server_url=tls_server % "localhost")) as sandbox:
        assert (await done(sandbox.run("6 * 7"))).stdout == "42"


async def test_unknown_authority(api: Any, tls_server: str) -> None:
    with pytest.raises(ServerUnreachableError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
        await done(api.PythonSandbox.create(server_url=tls_server % "localhost"))


async def test_wrong_name(
    api: Any, tls_server: str, authority: trustme.CA, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(authority, nowhere, monkeypatch)
    with pytest.raises(ServerUnreachableError, match="use the name that the server's certificate is for"):
        await done(api.PythonSandbox.create(server_url=tls_server % "127.0.0.1"))


def test_system_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Authorities that an administrator added to the machine are trusted, in addition to httpx's own."""
    loaded: list[ssl.SSLContext] = []
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda context, *_: loaded.append(context))
    context = _http._ssl_context(Config("https://a", None))
    assert context in loaded
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.cert_store_stats()["x509_ca"] > 50


async def test_tls_to_a_plain_http_server(api: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "handle_error", lambda *_: None)
    with pytest.raises(ServerUnreachableError, match="if the server speaks plain http, use http://"):
        await done(api.PythonSandbox.create(server_url=server.url.replace("http:", "https:")))


async def test_redirects_are_not_followed(api: Any, server: Server) -> None:
    server.answer("sandbox.start", Reply(307, "", {"Location": server.url + "/api/v1/rpc"}))
    with pytest.raises(UnexpectedAnswerError, match="not followed, because the API key would be sent along"):
        await done(api.PythonSandbox.create())
    assert len(server.requests) == 1


async def test_proxy(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks the environment's proxy for a tunnel to the server, and does not send it the key."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def serve() -> None:
            for _ in range(3):
                connection, _ = proxy.accept()
                with connection:
                    requests.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(ServerUnreachableError, match="403 Forbidden"):
            await done(api.PythonSandbox.create(server_url="https://sandboxes.invalid", api_key=TEST_KEY))
        thread.join()
    assert {request.split(b"\r\n")[0] for request in requests} == {b"CONNECT sandboxes.invalid:443 HTTP/1.1"}
    assert not any(TEST_KEY.encode() in request for request in requests)
