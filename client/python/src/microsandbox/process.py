"""Processes that go on when the call that starts them has ended."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable

from ._abilities import (
    ProcessCore,
    find_call,
    output_pieces,
    process_identity,
    process_info,
    process_list,
    process_list_call,
    start_call,
)
from ._core import Envs, run_options
from ._http import AsyncStream
from ._results import Piece, ProcessInfo, ProcessResult

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class BaseProcess(ProcessCore):
    """What processes with and without a terminal have in common."""

    _sandbox: BaseSandbox

    async def wait(
        self,
        timeout: float | None = None,
        *,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
    ) -> ProcessResult:
        """Wait until the process has ended. Return how, and what it has printed since its start.

        The server remembers the last 1 MiB of what was printed before this call. Everything after that is complete.

        timeout: seconds after which wait raises RequestTimeoutError, whose execution has the output. The process goes
            on. None, 0 and infinity mean no limit.
        on_stdout, on_stderr: called with each piece of output as it is printed. on_stdout also gets that of a terminal.
        """
        return await self._sandbox._http.run(self._wait_run(timeout, on_stdout, on_stderr))

    async def logs(self) -> ProcessResult:
        """Return the last 1 MiB that the process has printed, or what the server remembers of it. Do not wait."""
        return await self._sandbox._http.run(self._logs_run())

    async def info(self) -> ProcessInfo:
        """Return what the server knows about the process."""
        return process_info(await self._sandbox._http.call(self._info_call()))

    async def signal(self, name: str = "TERM", all: bool = False) -> None:  # noqa: A002
        """Send a signal, such as TERM or INT, to the process, or to everything that it has started."""
        await self._sandbox._http.call(self._signal_call(name, all))

    async def kill(self) -> None:
        """Kill the process and everything that it has started."""
        await self._sandbox._http.call(self._signal_call("KILL", True))


class Process(BaseProcess):
    """A process in a sandbox. It goes on when the program that started it ends."""

    def output(self, replay: bool = True) -> AsyncStream[Piece]:
        """Return the pieces of the output, for async for, until the process ends.

            async for piece in process.output():
                print(piece.stream, piece.text)

        replay: begin with the output that the server remembers.
        """
        return AsyncStream(self._sandbox._http, self._output_call(replay), output_pieces())

    async def send_stdin(self, data: str | bytes) -> None:
        """Write to the standard input, and return when the process has read it. start() needs open_stdin=True."""
        for call in self._input_calls(data):
            await self._sandbox._http.call(call)

    async def close_stdin(self) -> None:
        """End the standard input."""
        for call in self._input_calls(b"", close=True):
            await self._sandbox._http.call(call)


class Processes:
    """Starts and finds processes."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def start(
        self,
        command: str,
        args: Sequence[str] | None = None,
        *,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        open_stdin: bool = False,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a program without a shell, and return when it has started. It runs until it ends by itself.

        cwd, envs, user: as for command.run.
        stdin: the beginning of the standard input.
        open_stdin: keep the standard input open for send_stdin().
        tag: a name for connect(). It need not be unique.
        timeout: seconds after which the process is ended; None, 0 and infinity mean no limit.

        Raises CommandNotFoundError, CommandNotExecutableError and the errors of the connection.
        """
        options = run_options(cwd, envs, user, stdin)
        call = start_call(self._sandbox, command, args, timeout, tag, options, open_stdin=open_stdin)
        return Process(self._sandbox, *process_identity(await self._sandbox._http.call(call)))

    async def connect(self, process: int | str) -> Process:
        """Return the process with this pid, or the newest with this tag. It may have ended."""
        call = find_call(self._sandbox, process)
        return Process(self._sandbox, *process_identity(await self._sandbox._http.call(call)))

    async def list(self) -> builtins.list[ProcessInfo]:
        """Return the processes that run, and those that ended and that the server remembers."""
        return process_list(await self._sandbox._http.call(process_list_call(self._sandbox)))
