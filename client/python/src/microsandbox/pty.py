"""Processes with a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._abilities import find_call, output_bytes, process_identity, start_call
from ._core import Envs, run_options
from ._http import AsyncStream
from .process import BaseProcess

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Pty(BaseProcess):
    """A process with a terminal. It goes on when the program that started it ends."""

    def output(self, replay: bool = True) -> AsyncStream[bytes]:
        """Return what the process writes to the terminal, for async for, until the process ends.

        replay: begin with the output that the server remembers.
        """
        return AsyncStream(self._sandbox._http, self._output_call(replay), output_bytes())

    async def send_input(self, data: str | bytes) -> None:
        r"""Type into the terminal. "\r" is the Enter key, and "\x04" is Ctrl-D, which ends the input."""
        for call in self._input_calls(data):
            await self._sandbox._http.call(call)

    async def resize(self, cols: int, rows: int) -> None:
        """Change the size of the terminal."""
        await self._sandbox._http.call(self._resize_call(cols, rows))


class Terminals:
    """Starts and finds processes with a terminal."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def start(
        self,
        command: str = "bash",
        args: Sequence[str] | None = None,
        *,
        cols: int = 80,
        rows: int = 24,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Pty:
        """Start a program in a terminal with this number of columns and rows; see process.start."""
        options = run_options(cwd, envs, user)
        call = start_call(self._sandbox, command, args, timeout, tag, options, size=(cols, rows))
        return Pty(self._sandbox, *process_identity(await self._sandbox._http.call(call)))

    async def connect(self, process: int | str) -> Pty:
        """Return the process with this pid, or the newest with this tag. It may have ended."""
        call = find_call(self._sandbox, process)
        return Pty(self._sandbox, *process_identity(await self._sandbox._http.call(call)))
