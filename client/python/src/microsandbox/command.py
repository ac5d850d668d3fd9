"""Runs programs in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable

from ._core import Envs, run_options
from .command_execution import CommandExecution

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Command:
    """Runs programs in a sandbox."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def run(
        self,
        command: str,
        args: Sequence[str] | None = None,
        timeout: float | None = None,
        *,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        text: bool = True,
        on_stdout: Callable[[Any], Any] | None = None,
        on_stderr: Callable[[Any], Any] | None = None,
    ) -> CommandExecution:
        """Run a program without a shell. To run a shell command line, run sh with ["-c", line].

        An exit code other than 0 is not an error; see CommandExecution.exit_code and raise_for_status().

        timeout: seconds after which the program is killed; None, 0 and infinity mean the server's maximum.
        cwd: the working directory; None means the workdir of the sandbox.
        envs: environment variables in addition to those of the sandbox, a dict or ["NAME=value"].
        user: a name or number in the sandbox, optionally with ":" and a group; None means the user of the sandbox.
        stdin: the standard input; None means none.
        text: False transfers the output as bytes, for stdout_bytes and stderr_bytes of the result.
        on_stdout, on_stderr: called with each piece of output as it is printed; bytes if text is False. If one raises
            an exception, the program is ended, and run raises the exception.

        Raises CommandNotFoundError if the sandbox has no such program, CommandNotExecutableError if it cannot
        be run, RunTimeoutError after timeout, NotStartedError, and the errors of the connection. execution of an error
        has what was printed before it.
        """
        options = run_options(cwd, envs, user, stdin)
        run = self._sandbox._command_run(CommandExecution, command, args, timeout, options, text, on_stdout, on_stderr)
        return await self._sandbox._http.run(run)
