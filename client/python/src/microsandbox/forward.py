"""Connections from this machine to the ports of a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._core import SandboxCore, checked
from ._http import _proxy, _ssl_context
from ._rpc import failure, server_error
from .errors import InvalidParamsError, UnexpectedAnswerError

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_logger = logging.getLogger("microsandbox")

# Seconds that a program may stay silent after its client has sent everything. A WebSocket cannot tell the program that
# nothing follows, and a client that has sent everything may have closed the connection.
_END_LIMIT = 30.0


class Forward:
    """A port of this machine that leads to a port of a sandbox, while it is open.

    It opens when it is awaited or entered.
    """

    def __init__(self, sandbox_instance: SandboxCore, port: int, local_port: int, host: str) -> None:
        sandbox_instance._require_start()
        for name, value in (("port", port), ("local_port", local_port)):
            if not 0 <= checked(name, value, int) < 65536 or (name == "port" and value == 0):
                raise InvalidParamsError(f"{name} must be a port number, not {value}")
        self._sandbox = sandbox_instance
        self._port = port
        self._address = (checked("host", host, str), local_port)
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._ssl = _ssl_context(sandbox_instance._config) if sandbox_instance._config.tls else None

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of this machine."""
        return self._address

    @property
    def local_port(self) -> int:
        """The port of this machine."""
        return self.address[1]

    def __repr__(self) -> str:
        return f"<Forward {self._address[0]}:{self._address[1]} to port {self._port} of {self._sandbox.name!r}>"

    async def _open(self) -> Forward:
        import websockets  # noqa: F401  an installation without it fails here, and not at the first connection

        if self._server is None:
            self._server = await asyncio.start_server(self._accept, *self._address)
            self._address = self._server.sockets[0].getsockname()[:2]
        return self

    async def close(self) -> None:
        """Close the port and its connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101
        self._connections.add(task)
        try:
            await self._connect(reader, writer)
        except asyncio.CancelledError:
            pass  # by close, which waits for this task
        except Exception as error:  # noqa: BLE001  one connection must not end the others
            error = self._explained(error)
            _logger.warning("connection to port %d of sandbox %s: %s", self._port, self._sandbox.name, error)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from websockets.asyncio.client import connect

        class Connect(connect):  # type: ignore[misc]  # mypy does not read websockets
            def process_redirect(self, exc: Exception) -> Exception:
                return exc  # redirects are not followed, because the API key would be sent along

        config = self._sandbox._config
        url = f"ws{config.server_url[4:]}{self._sandbox._port_path(self._port)}"
        async with Connect(
            url,
            additional_headers={"Authorization": config.key.header()} if config.key else None,
            ssl=self._ssl,
            proxy=_proxy(config),
            compression=None,
            max_size=None,
            # The server pings. Its pings have limits that fit a program that does not read.
            ping_interval=None,
            logger=_quiet_logger(),
        ) as socket:
            sending = asyncio.ensure_future(_send(reader, socket))
            try:
                await _receive(socket, writer, sending)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    def _explained(self, error: Exception) -> Exception:
        """Return the server's error if the server refused a WebSocket."""
        from websockets.exceptions import InvalidStatus

        if not isinstance(error, InvalidStatus):
            return error
        answer = error.response
        headers = {name.lower(): value for name, value in answer.headers.raw_items()}
        return failure(answer.status_code, headers, answer.body or b"", keyless=self._sandbox._config.key is None)

    def __await__(self) -> Generator[Any, None, Forward]:
        return self._open().__await__()

    async def __aenter__(self) -> Forward:
        return await self._open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _send(reader: asyncio.StreamReader, socket: ClientConnection) -> None:
    while data := await reader.read(64 << 10):
        await socket.send(data)


async def _receive(socket: ClientConnection, writer: asyncio.StreamWriter, sending: asyncio.Future[None]) -> None:
    """Copy what the program sends, until it closes the connection."""
    from websockets.exceptions import ConnectionClosedOK

    receiving = asyncio.ensure_future(socket.recv())
    try:
        while True:
            # Without a limit while the client may send, because either side may be silent for any time.
            ended = sending.done()
            waits = {receiving} if ended else {receiving, sending}
            done, _ = await asyncio.wait(
                waits, timeout=_END_LIMIT if ended else None, return_when=asyncio.FIRST_COMPLETED
            )
            if receiving in done:
                data = receiving.result()
                if isinstance(data, str):  # the server's error, which is its last message
                    raise server_error(json.loads(data).get("error"), None, {}) or UnexpectedAnswerError(data)
                writer.write(data)
                await writer.drain()
                receiving = asyncio.ensure_future(socket.recv())
            elif ended:
                return
    except (ConnectionClosedOK, ConnectionError):
        return  # the program or the client has closed the connection
    finally:
        receiving.cancel()
        with contextlib.suppress(BaseException):
            await receiving


def _quiet_logger() -> logging.Logger:
    """Return a logger that logs nothing, because websockets logs headers, and the API key is in one."""
    logger = logging.Logger("microsandbox.forward", logging.CRITICAL + 1)
    logger.addHandler(logging.NullHandler())
    return logger
