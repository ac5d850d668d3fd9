"""The base class of the sandboxes of all languages, for asyncio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from ._core import Envs, SandboxCore, info_result, run_result
from ._http import AsyncHTTP
from ._results import SandboxInfo
from .command import Command
from .errors import MicrosandboxError, SandboxNotFoundError
from .execution import Execution
from .metrics import Metrics

_logger = logging.getLogger("microsandbox")

SandboxT = TypeVar("SandboxT", bound="BaseSandbox")


class BaseSandbox(SandboxCore):
    """A sandbox on an msbd server, for asyncio. Use PythonSandbox or NodeSandbox.

    create() returns a sandbox that is already started. The constructor sends nothing; start() or async with starts it:

        async with PythonSandbox(name="my-sandbox") as sandbox:
            ...

    Canceling a call, for example with asyncio.timeout() or task.cancel(), interrupts its run in the sandbox.
    All errors are subclasses of MicrosandboxError.
    """

    # For programs for version 0.1, which put an HTTP session here. This package does not use it.
    _session: Any = None

    def __init__(
        self,
        server_url: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        """Create an object for a sandbox, which need not exist yet. Nothing is sent.

        server_url: https://HOST[:PORT], or http:// on this machine. The default is MSB_SERVER_URL from the
            environment or from a .env file in the working directory or above it, or http://127.0.0.1:5555.
        namespace: None means the key's namespace, or default for a key that is not limited to one.
        name: 1 to 63 characters of A-Z a-z 0-9 - _; None generates a name.
        api_key: the default is MSB_API_KEY from the environment or from a .env file.

        Raises ConfigError if the URL, the key or a .env file cannot be used.
        """
        super().__init__(server_url, namespace, name, api_key)
        self._http = AsyncHTTP(self._config)

    async def get_default_image(self) -> str:
        """Return the name of the image that start() uses if none is given."""
        return self._image

    @classmethod
    def create(
        cls: type[SandboxT],
        server_url: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        api_key: str | None = None,
        *,
        image: str | None = None,
        memory: int | None = None,
        cpus: float | None = None,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        timeout: float | None = None,
    ) -> Creation[SandboxT]:
        """Create a sandbox and start it.

            async with PythonSandbox.create(name="my-sandbox") as sandbox:  # stopped at the end of the block
                ...

            sandbox = await PythonSandbox.create(name="my-sandbox")  # runs until sandbox.stop()

        The parameters are those of the class and of start().
        """
        sandbox = cls(server_url=server_url, namespace=namespace, name=name, api_key=api_key)
        return Creation(
            sandbox,
            image=image,
            memory=memory,
            cpus=cpus,
            volumes=volumes,
            envs=envs,
            workdir=workdir,
            timeout=timeout,
        )

    async def start(
        self,
        image: str | None = None,
        memory: int | None = None,
        cpus: float | None = None,
        timeout: float | None = None,
        *,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
    ) -> None:
        """Start the sandbox, and return when it is ready. If this object has already started it, do nothing.

        If a sandbox with this name is running, start succeeds immediately if its configuration is the same, and
        raises ConflictError if it is not.

        image: such as microsandbox/python; None means the image of the language.
        memory: MiB; None means the server's default, which is 512 unless the server is configured otherwise.
        cpus: virtual processors, rounded; None means the server's default, which is 1 unless configured otherwise.
        timeout: total seconds to wait. After that, start raises RequestTimeoutError, and the server removes what it
            has created. None means 180; 0 and infinity mean no limit.
        volumes: as far as the server supports them.
        envs: environment variables for everything that runs in the sandbox, a dict or ["NAME=value"].
        workdir: working directory of runs, an absolute path.
        """
        if self._is_started:
            return
        if image is None:
            image = await self.get_default_image()
        call = self._start_call(image, memory, cpus, volumes, envs, workdir, timeout)
        try:
            await self._http.call(call)
        except BaseException:
            await self._http.close()
            raise
        self._is_started = True

    async def stop(self) -> None:
        """Stop the sandbox, if this object started it. Its data is deleted, and its name can be used again.

        After an error other than SandboxNotFoundError, the sandbox still counts as started: it can be used, and
        stop can be called again.
        """
        if not self._is_started:
            return
        try:
            await self._http.call(self._stop_call())
        except SandboxNotFoundError:
            self._is_started = False
            await self._http.close()
            raise
        self._is_started = False
        await self._http.close()

    async def close(self) -> None:
        """Close the connections to the server as soon as no call is in progress. The sandbox keeps running.

        The next call opens new connections.
        """
        await self._http.close()

    async def info(self) -> SandboxInfo:
        """Return the sandbox's state and configuration as a dict. The sandbox need not be started by this object.

        Raises SandboxNotFoundError if it does not exist, and the errors of the connection.
        """
        try:
            return info_result(await self._http.call(self._info_call()))
        finally:
            if not self._is_started:
                await self._http.close()

    async def run(self, code: str, timeout: float | None = None) -> Execution:
        """Run code. Variables and definitions are kept for the next run. Runs of a sandbox are executed one by one.

        If the code raises an exception, the status of the result is error, and the traceback is in stderr.

        timeout: seconds after which the run is interrupted; None, 0 and infinity mean the server's maximum.

        Raises RunTimeoutError after timeout, NotStartedError, and the errors of the connection.
        """
        return Execution(run_result(await self._http.call(self._code_call(code, timeout))))

    @property
    def command(self) -> Command:
        """Runs programs in the sandbox."""
        return Command(self)

    @property
    def metrics(self) -> Metrics:
        """Returns the resource usage of the sandbox."""
        return Metrics(self)

    async def __aenter__(self: SandboxT) -> SandboxT:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Stop in a separate task, because a canceled scope would also cancel the request to stop.
        await asyncio.shield(asyncio.ensure_future(self._stop_and_close(error)))

    async def _stop_and_close(self, error: BaseException | None) -> None:
        """Stop the sandbox. If the block ended with an error, only log a failure to stop, to keep that error."""
        try:
            await self.stop()
        except SandboxNotFoundError:
            pass  # the sandbox no longer exists, which is the goal
        except MicrosandboxError as failure:
            if error is None:
                raise
            _logger.warning("stop sandbox %s: %s", self._name, failure)
        finally:
            await self.close()  # stop closes the connections only if it succeeds


class Creation(Generic[SandboxT], Coroutine[Any, Any, SandboxT], AbstractAsyncContextManager[SandboxT]):
    """The return value of BaseSandbox.create. Awaiting or entering it starts the sandbox.

    It is also a coroutine, because asyncio.run() and create_task() accept nothing else.
    """

    def __init__(self, sandbox: SandboxT, **options: Any) -> None:
        self._sandbox = sandbox
        # Pass only the given options, because the start() of a subclass for version 0.1 does not have all of them.
        self._options = {name: value for name, value in options.items() if value is not None}
        self._steps: Coroutine[Any, Any, SandboxT] | None = None
        self.__name__ = self.__qualname__ = f"{type(sandbox).__qualname__}.create"  # in the task's repr

    async def _start(self) -> SandboxT:
        await self._sandbox.start(**self._options)
        return self._sandbox

    def __await__(self) -> Generator[Any, None, SandboxT]:
        return self._start().__await__()

    def _coroutine(self) -> Coroutine[Any, Any, SandboxT]:
        # Create the coroutine on first use, because Python warns about a coroutine that is never awaited.
        if self._steps is None:
            self._steps = self._start()
        return self._steps

    def send(self, value: Any, /) -> Any:
        """Continue the start. The event loop calls this."""
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error in the start. The event loop calls this to cancel it."""
        return self._coroutine().throw(*error)

    def close(self) -> None:
        """Abort the start, or prevent it if it has not begun."""
        self._coroutine().close()

    async def __aenter__(self) -> SandboxT:
        return await self._start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._sandbox.__aexit__(kind, error, traceback)
