"""Sends calls over HTTP. AsyncHTTP is for asyncio, SyncHTTP for blocking code."""

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

# The first call imports httpx, because importing httpx takes longer than importing the rest of this package.

# Seconds to wait for a connection.
_CONNECT_LIMIT = 10.0
# Seconds that an idle connection is kept. Less than on the server, so that the server closes none during a call.
_IDLE_LIMIT = 30.0


class AsyncHTTP:
    """Makes calls without blocking."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # the event loop of _client
        self._calls = 0  # number of calls in progress
        self._closing = False

    async def call(self, call: Call) -> Any:
        """Make a call and return its result. Canceling it closes its connection, and the server ends the run."""
        deadline = Deadline(call.limit)
        attempt = 1
        self._calls += 1
        try:
            while True:
                try:
                    return await self._post(call, deadline)
                except MicrosandboxError as error:
                    pause = call.pause(error, attempt, deadline.remaining())
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
            failure = _convert_error(error, call, deadline, self.config)
        else:
            return _rpc.result(answer.status_code, answer.headers, bytes(body), keyless=self.config.key is None)
        # Raise outside of the except block: httpx's error contains the request with the key, and must not be chained.
        raise failure

    def _open(self) -> httpx.AsyncClient:
        import httpx

        # A program may use several event loops in sequence, because each asyncio.run() creates one.
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            transport = httpx.AsyncHTTPTransport(**_transport(self.config))
            self._client, self._loop = httpx.AsyncClient(transport=transport, **_client(self.config)), loop
        return self._client

    async def close(self) -> None:
        """Close the connections as soon as no call is in progress. The next call opens new ones."""
        self._closing = True
        await self._close_unused()

    async def _close_unused(self) -> None:
        if self._calls or not self._closing:
            return
        client, self._client, self._closing = self._client, None, False
        # Connections that belong to another event loop cannot be closed.
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()


class SyncHTTP:
    """Makes calls and blocks until each is answered. It can be used by several threads."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._lock = threading.Lock()  # guards the attributes below
        self._client: httpx.Client | None = None
        self._calls = 0  # number of calls in progress
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
                    pause = call.pause(error, attempt, deadline.remaining())
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
            failure = _convert_error(error, call, deadline, self.config)
        else:
            return _rpc.result(answer.status_code, answer.headers, bytes(body), keyless=self.config.key is None)
        # Raise outside of the except block: httpx's error contains the request with the key, and must not be chained.
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
        """Close the connections as soon as no call is in progress. The next call opens new ones."""
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
    """The value of httpx's extension "timeout", which limits each step of a request.

    httpx reads it at the beginning of each step, and gets the time that remains then. A plain dict would give each
    step the full time again.
    """

    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def get(self, step: str, default: Any = None) -> Any:
        """Return the seconds that a step may take; None without a limit."""
        remaining = self._deadline.remaining()
        if step == "connect":
            remaining = min(remaining, _CONNECT_LIMIT)
        # No call ever waits for the pool. Never return 0, which makes sockets non-blocking.
        return default if step == "pool" or remaining == math.inf else max(remaining, 0.001)

    def check(self) -> None:
        """Raise ReadTimeout if the call has no time left, even if each part of the response arrived in time."""
        import httpx

        if self._deadline.remaining() <= 0:
            raise httpx.ReadTimeout("")


def _client(config: Config) -> dict[str, Any]:
    from . import __version__

    headers = {"Content-Type": "application/json", "User-Agent": f"microsandbox-python/{__version__}"}
    if config.key is not None:
        headers["Authorization"] = config.key.header()
    # _transport reads the environment's proxies and certificates; httpx must not read them again.
    return {"base_url": config.server_url, "headers": headers, "trust_env": False}


def _transport(config: Config) -> dict[str, Any]:
    import httpx

    return {
        "verify": _ssl_context(config),
        "proxy": _proxy(config),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_LIMIT),
        "socket_options": _keepalive_options(),
    }


def _ssl_context(config: Config) -> ssl.SSLContext:
    """Return a context that trusts the system's and httpx's authorities, or SSL_CERT_FILE and SSL_CERT_DIR."""
    import ssl

    import httpx

    if not config.tls:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and loading the authorities would take 20 ms
    context = httpx.create_ssl_context()
    context.load_default_certs()
    return context


def _proxy(config: Config) -> str | None:
    """Return the proxy that the environment sets for the server; None for a server on this machine."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    host = urlsplit(config.server_url).hostname or ""
    if is_loopback(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get("https" if config.tls else "http") or proxies.get("all")


def _keepalive_options() -> list[tuple[int, int, int]]:
    """Return socket options that detect within two minutes that the server's machine is down.

    Without them, a run without a time limit would wait forever.
    """
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


def _convert_error(error: Exception, call: Call, deadline: Deadline, config: Config) -> MicrosandboxError:
    """Convert httpx's error into one that says what to do and does not contain the request."""
    import ssl

    import httpx

    where = f"no connection to {config.server_url}"
    if isinstance(error, httpx.ConnectTimeout):
        if deadline.expired():
            return RequestTimeoutError(f"{call.method}: {where} within {call.limit:g} s; {_HINT}")
        return ServerUnreachableError(f"{where} within {_CONNECT_LIMIT:g} s; {_HINT}")
    if isinstance(error, httpx.TimeoutException):
        return RequestTimeoutError(f"{call.method}: no answer within {call.limit:g} s")
    if isinstance(error, (httpx.ProxyError, httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return ServerUnreachableError(f"{where}: {error}; {_HINT}")
    if not isinstance(error, httpx.ConnectError):
        return ConnectionLostError(
            f"{call.method}: the connection to {config.server_url} ended before the response "
            f"({str(error) or type(error).__name__}): the call may have taken effect"
        )
    cause = _root_cause(error)
    hint = _HINT
    if isinstance(cause, ConnectionRefusedError):
        return ServerUnreachableError(
            f"nothing listens at {config.server_url}. Start it with 'msb server start', "
            f"or set {SERVER_URL} to the URL of another server"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        hint = (
            "use the name that the server's certificate is for; "
            "if its authority is your own, set SSL_CERT_FILE to the file of the authority's certificate"
        )
    elif isinstance(cause, ssl.SSLError):
        hint = (
            "if the server speaks plain http, use http:// on its own machine; "
            "elsewhere, ask its administrator to set up TLS"
        )
    return ServerUnreachableError(f"{where}: {cause}; {hint}")


_HINT = "check that the server is running and that its URL is right"


def _root_cause(error: BaseException) -> BaseException:
    """Return the operating system's error that caused one of httpx's; the error itself if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return error
    while cause.__cause__ is not None:
        cause = cause.__cause__
        for first in getattr(cause, "exceptions", ())[:1]:  # an ExceptionGroup with one error for each address tried
            cause = first
    return cause
