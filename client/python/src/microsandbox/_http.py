"""Sends calls over HTTP: once for asyncio, once blocking."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import TYPE_CHECKING, Any

from . import _rpc
from ._config import SERVER_URL, Config, is_loopback
from ._rpc import Call, Deadline
from .errors import ConnectionLostError, MicrosandboxError, RequestTimeoutError, ServerUnreachableError

if TYPE_CHECKING:
    import ssl

    import httpx

# httpx is imported by the first call: importing it takes longer than all of this package.

# Seconds until there is a connection.
_CONNECT_LIMIT = 10.0
# Seconds that an unused connection is kept; less than the server does, so that none is closed under a call.
_KEEP = 30.0


class AsyncHTTP:
    """Makes calls without blocking."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the client
        self._calls = 0  # in progress
        self._closing = False

    async def call(self, call: Call) -> Any:
        """Make a call and return its result. To cancel it closes its connection, and the server ends the run."""
        deadline = Deadline(call.limit)
        attempt = 1
        self._calls += 1
        try:
            while True:
                try:
                    return await self._post(call, deadline)
                except MicrosandboxError as error:
                    pause = call.pause(error, attempt, deadline.left())
                    if pause is None:
                        raise
                await asyncio.sleep(pause)
                attempt += 1
        finally:
            self._calls -= 1
            await self._close_unused()

    async def _post(self, call: Call, deadline: Deadline) -> Any:
        import httpx

        timeouts = Timeouts(deadline)
        try:
            async with self._open().stream(
                "POST", _rpc.PATH, content=call.body(), extensions={"timeout": timeouts}
            ) as answer:
                body = bytearray()
                async for part in answer.aiter_bytes():
                    body += part
                    timeouts.check()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = _explain(error, call, deadline, self.config)
        else:
            return _rpc.result(answer.status_code, answer.headers, bytes(body), keyless=self.config.key is None)
        # Out of reach of httpx's error, which holds the request and the key in it.
        raise failure

    def _open(self) -> httpx.AsyncClient:
        import httpx

        # A program may have several event loops, one after the other: each asyncio.run() makes one.
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            transport = httpx.AsyncHTTPTransport(**_transport(self.config))
            self._client, self._loop = httpx.AsyncClient(transport=transport, **_client(self.config)), loop
        return self._client

    async def close(self) -> None:
        """Close the connections, once no call is in progress. The next call opens new ones."""
        self._closing = True
        await self._close_unused()

    async def _close_unused(self) -> None:
        if self._calls or not self._closing:
            return
        client, self._client, self._closing = self._client, None, False
        # Those of another event loop cannot be closed.
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()


class SyncHTTP:
    """Makes calls and blocks until they are answered. It can be used by several threads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._lock = threading.Lock()  # of what follows
        self._client: httpx.Client | None = None
        self._calls = 0  # in progress
        self._closing = False

    def call(self, call: Call) -> Any:
        """Make a call and return its result. KeyboardInterrupt closes its connection, and the server ends the run."""
        deadline = Deadline(call.limit)
        attempt = 1
        with self._lock:
            self._calls += 1
        try:
            while True:
                try:
                    return self._post(call, deadline)
                except MicrosandboxError as error:
                    pause = call.pause(error, attempt, deadline.left())
                    if pause is None:
                        raise
                time.sleep(pause)
                attempt += 1
        finally:
            with self._lock:
                self._calls -= 1
            self._close_unused()

    def _post(self, call: Call, deadline: Deadline) -> Any:
        import httpx

        timeouts = Timeouts(deadline)
        try:
            with self._open().stream(
                "POST", _rpc.PATH, content=call.body(), extensions={"timeout": timeouts}
            ) as answer:
                body = bytearray()
                for part in answer.iter_bytes():
                    body += part
                    timeouts.check()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = _explain(error, call, deadline, self.config)
        else:
            return _rpc.result(answer.status_code, answer.headers, bytes(body), keyless=self.config.key is None)
        # Out of reach of httpx's error, which holds the request and the key in it.
        raise failure

    def _open(self) -> httpx.Client:
        import httpx

        with self._lock:
            client = self._client
            if client is None:
                transport = httpx.HTTPTransport(**_transport(self.config))
                client = self._client = httpx.Client(transport=transport, **_client(self.config))
        return client

    def close(self) -> None:
        """Close the connections, once no call is in progress. The next call opens new ones."""
        with self._lock:
            self._closing = True
        self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            if self._calls or not self._closing:
                return
            client, self._client, self._closing = self._client, None, False
        if client is not None:
            client.close()


class Timeouts(dict[str, Any]):
    """The extension "timeout" of httpx: how long each step of a request may last.

    It is asked anew at the beginning of each step, and tells what is left then: a step's time is not the next one's.
    """

    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def get(self, step: str, default: Any = None) -> Any:
        """Return the seconds for a step; None without a limit."""
        left = self._deadline.left()
        if step == "connect":
            left = min(left, _CONNECT_LIMIT)
        # Nothing ever waits for the pool. With 0, sockets do not block.
        return default if step == "pool" or left == math.inf else max(left, 0.001)

    def check(self) -> None:
        """End an answer that comes in drops, each of them in time."""
        import httpx

        if self._deadline.left() <= 0:
            raise httpx.ReadTimeout("")


def _client(config: Config) -> dict[str, Any]:
    from . import __version__

    headers = {"Content-Type": "application/json", "User-Agent": f"microsandbox-python/{__version__}"}
    if config.key is not None:
        headers["Authorization"] = config.key.header()
    # The transport knows what of the environment counts.
    return {"base_url": config.server_url, "headers": headers, "trust_env": False}


def _transport(config: Config) -> dict[str, Any]:
    import httpx

    return {
        "verify": _authorities(config),
        "proxy": _proxy(config),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP),
        "socket_options": _keepalive(),
    }


def _authorities(config: Config) -> ssl.SSLContext:
    """Trust what the system trusts, and what httpx brings along; or SSL_CERT_FILE and SSL_CERT_DIR."""
    import ssl

    import httpx

    if not config.tls:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used; the authorities take 20 ms to load
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


def _proxy(config: Config) -> str | None:
    """Find the proxy that the environment names. There is none on the way to this machine itself."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    host = urlsplit(config.server_url).hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get("https" if config.tls else "http") or proxies.get("all")


def _keepalive() -> list[tuple[int, int, int]]:
    """Notice within two minutes when the server's machine is gone: runs may have no limit of their own."""
    import socket

    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (
        ("TCP_KEEPIDLE", 60),
        ("TCP_KEEPALIVE", 60),
        ("TCP_KEEPINTVL", 15),
        ("TCP_KEEPCNT", 4),
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def _explain(error: Exception, call: Call, deadline: Deadline, config: Config) -> MicrosandboxError:
    """Turn httpx's error into one that says what to do about it, and holds nothing of the request."""
    import ssl

    import httpx

    where = f"no connection to {config.server_url}"
    if isinstance(error, httpx.ConnectTimeout):
        if deadline.over():
            return RequestTimeoutError(f"{call.method}: {where} within {call.limit:g} s; {_HINT}")
        return ServerUnreachableError(f"{where} within {_CONNECT_LIMIT:g} s; {_HINT}")
    if isinstance(error, httpx.TimeoutException):
        return RequestTimeoutError(f"{call.method}: no answer within {call.limit:g} s")
    if isinstance(error, (httpx.ProxyError, httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return ServerUnreachableError(f"{where}: {error}; {_HINT}")
    if not isinstance(error, httpx.ConnectError):
        return ConnectionLostError(
            f"{call.method}: the connection to {config.server_url} ended before the answer came "
            f"({str(error) or type(error).__name__}): it may have been done, or not"
        )
    cause = _root(error)
    hint = _HINT
    if isinstance(cause, ConnectionRefusedError):
        return ServerUnreachableError(
            f"nothing listens at {config.server_url}. Start it with 'msb server start', "
            f"or name another server with {SERVER_URL}"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        hint = (
            "use the name that the server's certificate is for; "
            "if its authority is your own, name the file of that one's certificate in SSL_CERT_FILE"
        )
    elif isinstance(cause, ssl.SSLError):
        hint = "if the server speaks plain http, use http:// on its own machine; elsewhere have TLS set up"
    return ServerUnreachableError(f"{where}: {cause}; {hint}")


_HINT = "see whether the server runs and its URL is right"


def _root(error: BaseException) -> BaseException:
    """Find the system's error below one of httpx's; that one itself if there is none."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    if below is None:
        return error
    while below.__cause__ is not None:
        below = below.__cause__
        for first in getattr(below, "exceptions", ())[:1]:  # an ExceptionGroup: one for each address that was tried
            below = first
    return below
