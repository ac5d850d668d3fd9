"""The base class of the sandboxes of all languages, for asyncio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Callable, Generic, TypeVar

from ._core import Envs, SandboxCore, info_result, run_options
from ._http import AsyncHTTP
from ._results import Context, Result, SandboxInfo
from .command import Command
from .contexts import Contexts
from .errors import MicrosandboxError, SandboxNotFoundError
from .execution import Execution
from .files import Files
from .forward import Forward
from .metrics import Metrics
from .process import Processes
from .pty import Terminals

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

    _is_async = True

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
        disk: int | None = None,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
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
            disk=disk,
            volumes=volumes,
            envs=envs,
            workdir=workdir,
            user=user,
            hostname=hostname,
            timeout=timeout,
        )

    async def start(
        self,
        image: str | None = None,
        memory: int | None = None,
        cpus: float | None = None,
        timeout: float | None = None,
        *,
        disk: int | None = None,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
    ) -> None:
        """Start the sandbox, and return when it is ready. If this object has already started it, do nothing.

        If a sandbox with this name is running, start succeeds immediately if its configuration is the same, and
        raises ConflictError if it is not.

        image: such as microsandbox/python; None means the image of the language.
        memory: MiB; None means the server's default, which is 512 unless the server is configured otherwise.
        cpus: virtual processors, rounded; None means the server's default, which is 1 unless configured otherwise.
        timeout: total seconds to wait. After that, start raises RequestTimeoutError, and the server removes what it
            has created. None means 180; 0 and infinity mean no limit.
        disk: MiB, of the writable disk; None means the server's default, which is 4096 unless configured otherwise.
        volumes: as far as the server supports them.
        envs: environment variables for everything that runs in the sandbox, a dict or ["NAME=value"].
        workdir: working directory of runs, an absolute path. It is created if it does not exist.
        user: the user of everything that runs in the sandbox and names no user itself, a name or number in the sandbox,
            optionally with ":" and a group; None means the user of the image.
        hostname: 1 to 63 letters, digits and "-"; None means "sandbox".
        """
        if self._is_started:
            return
        if image is None:
            image = await self.get_default_image()
        call = self._start_call(image, memory, cpus, disk, volumes, envs, workdir, user, hostname, timeout)
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

    async def run(
        self,
        code: str,
        timeout: float | None = None,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
        on_result: Callable[[Result], Any] | None = None,
    ) -> Execution:
        """Run code. Variables and definitions are kept for the next run. Runs of a context are executed one by one.

        If the code raises an exception, the status of the result is error, and the traceback is in stderr; see also
        raise_for_status(). Values that the code shows, such as that of the last expression, are in results, and those
        that have text are also in stdout.

        timeout: seconds after which the run is interrupted; None, 0 and infinity mean the server's maximum.
        language: python, node or bash; None means that of the sandbox.
        context: a context of sandbox.contexts; None means that of the language and the user.
        cwd: the working directory; None means that in which the previous run ended.
        envs: environment variables for this run, a dict or ["NAME=value"].
        user: a name or number in the sandbox. Each user has contexts of their own.
        stdin: the standard input of this run.
        on_stdout, on_stderr: called with each piece of output as it is printed.
        on_result: called with each value when the code shows it.

        Callbacks are functions or coroutine functions. If one raises an exception, the run is interrupted, and run
        raises the exception.

        Raises RunTimeoutError after timeout, NotStartedError, and the errors of the connection. execution of an error
        has what was printed before it.
        """
        options = run_options(cwd, envs, user, stdin)
        run = self._code_run(Execution, code, timeout, language, context, options, on_stdout, on_stderr, on_result)
        return await self._http.run(run)

    def forward(self, port: int, local_port: int = 0, host: str = "127.0.0.1") -> Forward:
        """Make a TCP port of the sandbox a port of this machine.

            async with sandbox.forward(8000) as forward:
                print(f"http://127.0.0.1:{forward.local_port}")

        The program in the sandbox listens on its loopback interface. Without async with, await forward(), and await
        close() of the result.

        local_port: 0 chooses a free port.
        host: the address of this machine on which the port is opened. Everyone who can reach it can connect.
        """
        return Forward(self, port, local_port, host)

    @property
    def command(self) -> Command:
        """Runs programs in the sandbox."""
        return Command(self)

    @property
    def process(self) -> Processes:
        """Starts and finds processes that go on when the call has ended."""
        return Processes(self)

    @property
    def pty(self) -> Terminals:
        """Starts and finds processes with a terminal."""
        return Terminals(self)

    @property
    def files(self) -> Files:
        """Reads, writes, watches, uploads and downloads files."""
        return Files(self)

    @property
    def contexts(self) -> Contexts:
        """Creates and removes contexts of run()."""
        return Contexts(self)

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
