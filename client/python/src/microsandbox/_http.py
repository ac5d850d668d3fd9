"""Sends calls over HTTP. AsyncHTTP is for asyncio, SyncHTTP for blocking code."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Generic, TypeVar

from . import _rpc
from ._config import SERVER_URL, Config, is_loopback
from ._results import Output
from ._rpc import Call, Deadline, EventReader, Transfer
from ._runs import Run
from ._transfers import Progress, Reader
from .errors import ConnectionLostError, MicrosandboxError, RequestTimeoutError, ServerUnreachableError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Generator

    import httpx

T = TypeVar("T")
OutputT = TypeVar("OutputT", bound=Output)

# The first call imports httpx, because importing httpx takes longer than importing the rest of this package.

# Seconds to wait for a connection.
_CONNECT_LIMIT = 10.0
# Seconds that an idle connection is kept. Less than on the server, so that the server closes none during a call.
_IDLE_LIMIT = 30.0
# Seconds without a byte after which a stream or a transfer counts as lost. The server sends something every 15 s in a
# stream, and disconnects a client that accepts nothing for 60 s.
_SILENCE_LIMIT = 90.0


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

        async def once(deadline: Deadline) -> Any:
            answer = await self._send(call, deadline, None)
            try:
                return _rpc.result(answer.status, answer.headers, await answer.read(), keyless=self.config.key is None)
            finally:
                await answer.close()

        return await self._attempts(call, once)

    async def run(self, run: Run[OutputT]) -> OutputT:
        """Run code or a command and return its result, or wait for a process. Calls the callbacks on the way."""
        try:
            if not run.call.stream:
                return run.finish(await self.call(run.call))
            async with AsyncStream(self, run.call, run.feed) as calls:
                async for callback, value in calls:
                    await _notify(callback, value)
            return run.finish(run.result)
        except MicrosandboxError as error:
            run.fail(error)
            raise

    async def send(self, call: Transfer, chunks: Callable[[], Iterator[bytes]], progress: Progress | None) -> Any:
        """Upload chunks, and return the description of what was written. Threads read the chunks."""

        async def content() -> AsyncIterator[bytes]:
            source, sent = chunks(), 0
            while True:
                chunk = await asyncio.to_thread(next, source, None)
                if chunk is None:
                    return
                yield chunk
                sent += len(chunk)
                await _notify(progress, sent)

        answer = await self.open(call, content)
        try:
            return _rpc.json_object(answer.headers, await answer.read())
        finally:
            await answer.close()

    async def receive(self, call: Transfer, consume: Callable[[Reader], T], progress: Progress | None = None) -> T:
        """Download, and return what consume makes of it. consume reads in a thread."""
        loop = asyncio.get_running_loop()
        answer = await self.open(call)
        reading: asyncio.Task[Any] | None = None
        canceled = False
        received = 0

        async def chunk() -> bytes:
            nonlocal reading, received
            if canceled:
                raise asyncio.CancelledError
            reading = asyncio.current_task()
            part = await answer.chunk()
            received += len(part)
            await _notify(progress if part else None, received)
            return part

        reader = Reader(lambda: asyncio.run_coroutine_threadsafe(chunk(), loop).result())
        work = asyncio.ensure_future(asyncio.to_thread(consume, reader))
        try:
            return await asyncio.shield(work)
        finally:
            canceled = True
            if not work.done():
                if reading is not None:
                    reading.cancel()
                await asyncio.wait([work])  # until it has removed its temporary file
                with contextlib.suppress(asyncio.CancelledError):
                    work.exception()
            await answer.close()

    async def open(self, call: Call, content: Callable[[], AsyncIterator[bytes]] | None = None) -> AsyncAnswer:
        """Send a call, and return the response without its body, or raise the error of the response."""

        async def once(deadline: Deadline) -> AsyncAnswer:
            answer = await self._send(call, deadline, content)
            if answer.ok:
                return answer
            try:
                body = await answer.read()
            finally:
                await answer.close()
            raise _rpc.failure(answer.status, answer.headers, body, keyless=self.config.key is None)

        return await self._attempts(call, once)

    async def _attempts(self, call: Call, once: Callable[[Deadline], Awaitable[T]]) -> T:
        """Make a call until it must not be retried."""
        deadline = Deadline(call.limit)
        attempt = 1
        self._calls += 1
        try:
            while True:
                try:
                    return await once(deadline)
                except MicrosandboxError as error:
                    pause = call.pause(error, attempt, deadline.remaining())
                    if pause is None:
                        raise
                await asyncio.sleep(pause)
                attempt += 1
        finally:
            await self._release()

    async def _send(
        self, call: Call, deadline: Deadline, content: Callable[[], AsyncIterator[bytes]] | None
    ) -> AsyncAnswer:
        import httpx

        timeouts = Timeouts(deadline, call)
        self._calls += 1
        answer = None
        try:
            client = self._open()
            request = client.build_request(
                call.verb,
                call.path,
                headers=call.headers(),
                content=content() if content else call.body(),
                extensions={"timeout": timeouts},
            )
            answer = AsyncAnswer(self, call, deadline, timeouts, await client.send(request, stream=True))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = _convert_error(error, call, deadline, self.config)
        else:
            return answer
        finally:
            if answer is None:
                await self._release()
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

    async def _release(self) -> None:
        """End a call in progress."""
        self._calls -= 1
        await self._close_unused()

    async def _close_unused(self) -> None:
        if self._calls or not self._closing:
            return
        client, self._client, self._closing = self._client, None, False
        # Connections that belong to another event loop cannot be closed.
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.aclose()


class AsyncAnswer:
    """A response whose headers have arrived."""

    def __init__(
        self, http: AsyncHTTP, call: Call, deadline: Deadline, timeouts: Timeouts, response: httpx.Response
    ) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.ok = response.is_success
        self._http, self._call, self._deadline, self._timeouts = http, call, deadline, timeouts
        self._response = response
        self._parts = response.aiter_bytes()
        self._closed = False
        timeouts.answered = True

    async def chunk(self) -> bytes:
        """Return the next bytes of the body; b"" at its end."""
        import httpx

        try:
            async for part in self._parts:
                self._timeouts.check()
                if part:
                    return part
        except (httpx.HTTPError, httpx.StreamError) as error:
            failure = _convert_error(error, self._call, self._deadline, self._http.config)
        else:
            return b""
        raise failure  # outside of the except block, as in _send

    async def read(self) -> bytes:
        """Return the body."""
        body = bytearray()
        while part := await self.chunk():
            body += part
        return bytes(body)

    async def close(self) -> None:
        """Close the response, also its connection if there is more to read. It may be called repeatedly."""
        if not self._closed:
            self._closed = True
            try:
                await self._response.aclose()
            finally:
                await self._http._release()


class AsyncStream(Generic[T]):
    """Items from the server, for async for. close() or the end of an async with block ends the connection.

    The connection begins when the stream is awaited, entered or read for the first time.
    """

    def __init__(
        self, http: AsyncHTTP, call: Call, convert: Callable[[str, Any], Iterable[T]], *, announced: bool = False
    ) -> None:
        """Describe a stream. announced: its connection has begun only when its first event arrives."""
        self._http, self._call, self._announced = http, call, announced
        self._events = EventReader(call, convert)
        self._answer: AsyncAnswer | None = None

    async def _open(self: AsyncStreamT) -> AsyncStreamT:
        if self._answer is None and not self._events.ended:
            self._answer = await self._http.open(self._call)
            try:
                self._events.begin(self._answer.status, self._answer.headers)
                while self._announced and not self._events.begun:
                    await self._receive(self._answer)
                if self._announced:
                    self._events.check()
            except BaseException:
                await self.close()
                raise
        return self

    async def _receive(self, answer: AsyncAnswer) -> None:
        try:
            self._events.feed(await answer.chunk())
        except MicrosandboxError:
            if not self._events.ended:  # not closed by another task
                await self.close()
                raise

    async def __anext__(self) -> T:
        await self._open()
        while self._answer is not None and not self._events.items and not self._events.ended:
            await self._receive(self._answer)
        if self._events.items:
            return self._events.items.popleft()
        await self.close()
        self._events.check()
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the connection. Other tasks that wait for an item get none."""
        self._events.ended = True
        if self._answer is not None:
            await self._answer.close()

    def __await__(self: AsyncStreamT) -> Generator[Any, None, AsyncStreamT]:
        return self._open().__await__()

    async def __aenter__(self: AsyncStreamT) -> AsyncStreamT:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self: AsyncStreamT) -> AsyncStreamT:
        return self


AsyncStreamT = TypeVar("AsyncStreamT", bound=AsyncStream[Any])


async def _notify(callback: Callable[[Any], Any] | None, value: Any) -> None:
    """Call a callback, and await it if it is a coroutine function."""
    outcome = callback(value) if callback is not None else None
    if inspect.isawaitable(outcome):
        await outcome


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

        def once(deadline: Deadline) -> Any:
            answer = self._send(call, deadline, None)
            try:
                return _rpc.result(answer.status, answer.headers, answer.read(), keyless=self.config.key is None)
            finally:
                answer.close()

        return self._attempts(call, once)

    def run(self, run: Run[OutputT]) -> OutputT:
        """Run code or a command and return its result, or wait for a process. Calls the callbacks on the way."""
        try:
            if not run.call.stream:
                return run.finish(self.call(run.call))
            with SyncStream(self, run.call, run.feed) as calls:
                for callback, value in calls:
                    callback(value)
            return run.finish(run.result)
        except MicrosandboxError as error:
            run.fail(error)
            raise

    def send(self, call: Transfer, chunks: Callable[[], Iterator[bytes]], progress: Progress | None) -> Any:
        """Upload chunks, and return the description of what was written."""

        def content() -> Iterator[bytes]:
            sent = 0
            for chunk in chunks():
                yield chunk
                sent += len(chunk)
                if progress is not None:
                    progress(sent)

        answer = self.open(call, content)
        try:
            return _rpc.json_object(answer.headers, answer.read())
        finally:
            answer.close()

    def receive(self, call: Transfer, consume: Callable[[Reader], T], progress: Progress | None = None) -> T:
        """Download, and return what consume makes of it."""
        received = 0
        answer = self.open(call)

        def chunk() -> bytes:
            nonlocal received
            part = answer.chunk()
            received += len(part)
            if part and progress is not None:
                progress(received)
            return part

        try:
            return consume(Reader(chunk))
        finally:
            answer.close()

    def open(self, call: Call, content: Callable[[], Iterator[bytes]] | None = None) -> SyncAnswer:
        """Send a call, and return the response without its body, or raise the error of the response."""

        def once(deadline: Deadline) -> SyncAnswer:
            answer = self._send(call, deadline, content)
            if answer.ok:
                return answer
            try:
                body = answer.read()
            finally:
                answer.close()
            raise _rpc.failure(answer.status, answer.headers, body, keyless=self.config.key is None)

        return self._attempts(call, once)

    def _attempts(self, call: Call, once: Callable[[Deadline], T]) -> T:
        """Make a call until it must not be retried."""
        deadline = Deadline(call.limit)
        attempt = 1
        self._acquire()
        try:
            while True:
                try:
                    return once(deadline)
                except MicrosandboxError as error:
                    pause = call.pause(error, attempt, deadline.remaining())
                    if pause is None:
                        raise
                time.sleep(pause)
                attempt += 1
        finally:
            self._release()

    def _send(self, call: Call, deadline: Deadline, content: Callable[[], Iterator[bytes]] | None) -> SyncAnswer:
        import httpx

        timeouts = Timeouts(deadline, call)
        self._acquire()
        answer = None
        try:
            client = self._open()
            request = client.build_request(
                call.verb,
                call.path,
                headers=call.headers(),
                content=content() if content else call.body(),
                extensions={"timeout": timeouts},
            )
            answer = SyncAnswer(self, call, deadline, timeouts, client.send(request, stream=True))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = _convert_error(error, call, deadline, self.config)
        else:
            return answer
        finally:
            if answer is None:
                self._release()
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

    def _acquire(self) -> None:
        """Begin a call."""
        with self._lock:
            self._calls += 1

    def _release(self) -> None:
        """End a call."""
        with self._lock:
            self._calls -= 1
        self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            if self._calls or not self._closing:
                return
            client, self._client, self._closing = self._client, None, False
        if client is not None:
            client.close()


class SyncAnswer:
    """A response whose headers have arrived."""

    def __init__(
        self, http: SyncHTTP, call: Call, deadline: Deadline, timeouts: Timeouts, response: httpx.Response
    ) -> None:
        self.status = response.status_code
        self.headers = response.headers
        self.ok = response.is_success
        self._http, self._call, self._deadline, self._timeouts = http, call, deadline, timeouts
        self._response = response
        self._parts = response.iter_bytes()
        self._closed = False
        timeouts.answered = True

    def chunk(self) -> bytes:
        """Return the next bytes of the body; b"" at its end."""
        import httpx

        try:
            for part in self._parts:
                self._timeouts.check()
                if part:
                    return part
        except (httpx.HTTPError, httpx.StreamError) as error:
            failure = _convert_error(error, self._call, self._deadline, self._http.config)
        else:
            return b""
        raise failure  # outside of the except block, as in _send

    def read(self) -> bytes:
        """Return the body."""
        body = bytearray()
        while True:
            part = self.chunk()
            if not part:
                return bytes(body)
            body += part

    def interrupt(self) -> None:
        """End the connection under another thread that waits for bytes. That thread must close the response."""
        connection = self._response.extensions["network_stream"].get_extra_info("socket")
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the response, also its connection if there is more to read. It may be called repeatedly."""
        if not self._closed:
            self._closed = True
            try:
                self._response.close()
            finally:
                self._http._release()


class SyncStream(Generic[T]):
    """Items from the server, for a for loop. close() or the end of a with block ends the connection."""

    def __init__(
        self, http: SyncHTTP, call: Call, convert: Callable[[str, Any], Iterable[T]], *, announced: bool = False
    ) -> None:
        """Connect. announced: the connection has begun only when its first event arrives."""
        self._events = EventReader(call, convert)
        self._reading = threading.Lock()
        self._answer = http.open(call)
        try:
            self._events.begin(self._answer.status, self._answer.headers)
            while announced and not self._events.begun:
                self._receive()
            if announced:
                self._events.check()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> None:
        try:
            self._events.feed(self._answer.chunk())
        except MicrosandboxError:
            if not self._events.ended:  # not closed by another thread
                self.close()
                raise

    def __next__(self) -> T:
        with self._reading:
            while not self._events.items and not self._events.ended:
                self._receive()
            if self._events.items:
                return self._events.items.popleft()
            self._answer.close()
        self._events.check()
        raise StopIteration

    def close(self) -> None:
        """End the connection. Another thread that waits for an item gets none."""
        self._events.ended = True
        if self._reading.acquire(blocking=False):
            self._answer.close()
            self._reading.release()
        else:
            self._answer.interrupt()

    def __enter__(self: SyncStreamT) -> SyncStreamT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self: SyncStreamT) -> SyncStreamT:
        return self


SyncStreamT = TypeVar("SyncStreamT", bound=SyncStream[Any])


class Timeouts(dict[str, Any]):
    """The value of httpx's extension "timeout", which limits each step of a request.

    httpx reads it at the beginning of each step, and gets the time that remains then. A plain dict would give each
    step the full time again.
    """

    def __init__(self, deadline: Deadline, call: Call) -> None:
        super().__init__()
        self._deadline = deadline
        self._silence_limit = _SILENCE_LIMIT if call.stream or isinstance(call, Transfer) else math.inf
        self.answered = False  # whether the headers of the response have arrived

    def get(self, step: str, default: Any = None) -> Any:
        """Return the seconds that a step may take; None without a limit."""
        remaining = self._deadline.remaining()
        if step == "connect":
            remaining = min(remaining, _CONNECT_LIMIT)
        elif step == "write" or (step == "read" and self.answered):
            remaining = min(remaining, self._silence_limit)
        # No call ever waits for the pool. Never return 0, which makes sockets non-blocking.
        return default if step == "pool" or remaining == math.inf else max(remaining, 0.001)

    def check(self) -> None:
        """Raise ReadTimeout if the call has no time left, even if each part of the response arrived in time."""
        import httpx

        if self._deadline.remaining() <= 0:
            raise httpx.ReadTimeout("")


def _client(config: Config) -> dict[str, Any]:
    from . import __version__

    headers = {"User-Agent": f"microsandbox-python/{__version__}"}
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
    if isinstance(error, httpx.TimeoutException) and call.limit is not None and deadline.expired():
        return RequestTimeoutError(f"{call.method}: {call.overdue} within {call.limit:g} s")
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
