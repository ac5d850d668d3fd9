"""Runs programs in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._core import run_result
from .command_execution import CommandExecution

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Command:
    """Runs programs in a sandbox."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def run(
        self, command: str, args: Sequence[str] | None = None, timeout: float | None = None
    ) -> CommandExecution:
        """Run a program without a shell. To run a shell command line, run sh with ["-c", line].

        An exit code other than 0 is not an error; see CommandExecution.exit_code.

        timeout: seconds after which the program is killed; None, 0 and infinity mean the server's maximum.

        Raises CommandNotFoundError if the sandbox has no such program, CommandNotExecutableError if it cannot
        be run, RunTimeoutError after timeout, NotStartedError, and the errors of the connection.
        """
        call = self._sandbox._command_call(command, args, timeout)
        return CommandExecution(run_result(await self._sandbox._http.call(call)))
