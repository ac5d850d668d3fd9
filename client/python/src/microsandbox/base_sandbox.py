"""What the sandboxes of all languages have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from ._core import Envs, SandboxCore, run_result
from ._http import AsyncHTTP
from .command import Command
from .errors import MicrosandboxError, SandboxNotFoundError
from .execution import Execution
from .metrics import Metrics

_logger = logging.getLogger("microsandbox")

SandboxT = TypeVar("SandboxT", bound="BaseSandbox")


class BaseSandbox(SandboxCore):
    """A sandbox on a server of msbd, for asyncio. Use PythonSandbox or NodeSandbox.

    It is made with create(), which starts it, or by itself and then started:

        async with PythonSandbox(name="my-sandbox") as sandbox:
            ...

    Cancelling a call, as asyncio.timeout() and task.cancel() do, ends what it runs in the sandbox.
    All errors are a MicrosandboxError.
    """

    # For programs that put an HTTP session here, as version 0.1 had it. Nothing uses it.
    _session: Any = None

    def __init__(
        self,
        server_url: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        """Name a sandbox. Nothing is sent: it need not be there yet.

        server_url: https://HOST[:PORT], or http:// on this machine; otherwise MSB_SERVER_URL of the environment
            or of a .env file in the working directory or above it, or http://127.0.0.1:5555.
        namespace: None is the key's own, or default for a key that is not limited to one.
        name: 1 to 63 of A-Z a-z 0-9 - _; None makes one up.
        api_key: otherwise MSB_API_KEY of the environment or of a .env file.

        Raises ConfigError when the URL, the key or the file cannot be used.
        """
        super().__init__(server_url, namespace, name, api_key)
        self._http = AsyncHTTP(self._config)

    async def get_default_image(self) -> str:
        """Return the name of the image that the sandbox is started from unless another is named."""
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
        """Make a sandbox and start it.

            async with PythonSandbox.create(name="my-sandbox") as sandbox:  # stopped at the end
                ...

            sandbox = await PythonSandbox.create(name="my-sandbox")  # until sandbox.stop()

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
        """Start the sandbox, and return when it is ready. One that this object has started stays as it is.

        Starting a name that runs with an equal configuration succeeds at once; with another one it raises
        ConflictError.

        image: such as microsandbox/python; None is the language's own.
        memory: MiB; None is the server's default, 512 unless it says otherwise.
        cpus: virtual processors, rounded; None is the server's default, 1 unless it says otherwise.
        timeout: seconds to wait in all; then RequestTimeoutError, and what was made so far is removed.
            None is 180; 0 and infinity are no limit.
        volumes: as the server offers them.
        envs: environment variables for everything that runs in it, a dict or ["NAME=value"].
        workdir: absolute path in which runs begin.
        """
        if self._is_started:
            return
        call = self._start_call(image or await self.get_default_image(), memory, cpus, volumes, envs, workdir, timeout)
        try:
            await self._http.call(call)
        except BaseException:
            await self._http.close()
            raise
        self._is_started = True

    async def stop(self) -> None:
        """Stop the sandbox, if this object started it: all that was written in it is gone, and its name is free.

        After an error, other than SandboxNotFoundError, it counts as started still, and can be used and stopped.
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
        """Close the connections to the server, once no call is in progress, and let the sandbox run on.

        The next call opens new ones.
        """
        await self._http.close()

    async def run(self, code: str, timeout: float | None = None) -> Execution:
        """Run code. What it defines is there for the next run; runs of one sandbox take turns.

        Code that raises is a result, whose status is error, and its traceback is in stderr.

        timeout: seconds after which it is interrupted; None, 0 and infinity are the server's maximum.

        Raises RunTimeoutError after timeout, NotStartedError, and the errors of the connection.
        """
        return Execution(run_result(await self._http.call(self._code_call(code, timeout))))

    @property
    def command(self) -> Command:
        """Runs programs in the sandbox."""
        return Command(self)

    @property
    def metrics(self) -> Metrics:
        """Says what the sandbox uses."""
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
        # A task of its own: a scope that was cancelled would cancel the request to stop, too.
        await asyncio.shield(asyncio.ensure_future(self._end(error)))

    async def _end(self, error: BaseException | None) -> None:
        """Stop without hiding the error that ended the block."""
        try:
            await self.stop()
        except SandboxNotFoundError:
            pass  # it is gone, as it should be
        except MicrosandboxError as failure:
            if error is None:
                raise
            _logger.warning("stop sandbox %s: %s", self._name, failure)
        finally:
            await self.close()  # nobody else would, of a sandbox that was not stopped


class Creation(Generic[SandboxT], Coroutine[Any, Any, SandboxT], AbstractAsyncContextManager[SandboxT]):
    """A sandbox that starts when it is awaited or entered; see BaseSandbox.create.

    It is a coroutine, too, since asyncio.run() and create_task() take nothing else.
    """

    def __init__(self, sandbox: SandboxT, **options: Any) -> None:
        self._sandbox = sandbox
        # Those that were given: a subclass whose start() is of version 0.1 knows not all of them.
        self._options = {name: value for name, value in options.items() if value is not None}
        self._steps: Coroutine[Any, Any, SandboxT] | None = None
        self.__name__ = self.__qualname__ = f"{type(sandbox).__qualname__}.create"  # in the task's repr

    async def _start(self) -> SandboxT:
        await self._sandbox.start(**self._options)
        return self._sandbox

    def __await__(self) -> Generator[Any, None, SandboxT]:
        return self._start().__await__()

    def _coroutine(self) -> Coroutine[Any, Any, SandboxT]:
        # Made when it is used: there is a warning about each that is not.
        if self._steps is None:
            self._steps = self._start()
        return self._steps

    def send(self, value: Any, /) -> Any:
        """Go on with the start, as the event loop does."""
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error in the start, as the event loop does to cancel it."""
        return self._coroutine().throw(*error)

    def close(self) -> None:
        """End the start where it is, or before it begins."""
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
