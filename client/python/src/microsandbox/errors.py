"""The errors of this package. All are subclasses of MicrosandboxError, which is a RuntimeError."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    _TimeoutError = TimeoutError
else:
    import asyncio

    class _TimeoutError(TimeoutError, asyncio.TimeoutError):
        """Before Python 3.11, asyncio.TimeoutError is a separate class."""


class MicrosandboxError(RuntimeError):
    """The base of all errors of this package. No error holds the API key.

    message: what happened and what to do. It is for people and may change.
    code: the JSON-RPC error code; None if the server sent none.
    status: the HTTP status; None if there was no response.
    request_id: identifies the request in the server's log; None if there was no response.
    retry_after: seconds that the server asks to wait; None if it did not say.
    execution: what a run or a process printed before the error, in the class of its result; None if nothing ran.
    """

    def __init__(
        self,
        message: str,
        *,
        code: int | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.execution: Any = None
        self._data: dict[str, Any] = {}  # the details of the server

    def __str__(self) -> str:
        return f"{self.message} (request id {self.request_id})" if self.request_id else self.message


# The server's errors, one class for each error code.


class ParseError(MicrosandboxError):
    """-32700: the request is not strict JSON, for example because the code contains half a surrogate pair."""


class InvalidRequestError(MicrosandboxError):
    """-32600: the request is invalid, for example longer than 1 MiB, or the path of the URL is wrong."""


class MethodNotFoundError(MicrosandboxError):
    """-32601: the server does not have the method, because it is older than this package."""


class InvalidParamsError(MicrosandboxError, ValueError):
    """-32602: a parameter is wrong, out of range or not supported; the message names it.

    code is None if this package found the mistake before sending, such as a timeout that is not a number.
    """


class AuthenticationError(MicrosandboxError):
    """-32002: the key is missing, malformed, expired, revoked or unknown."""


class PermissionDeniedError(MicrosandboxError):
    """-32004: the key is valid, but limited to other namespaces or other methods."""


class SandboxNotFoundError(MicrosandboxError):
    """-32003: the sandbox does not exist, or a process, file or context in it."""


class ConflictError(MicrosandboxError):
    """-32005: the sandbox, a process or a file is in the wrong state; the message says which."""


class ResourceExhaustedError(MicrosandboxError):
    """-32006: a quota or a rate limit was exceeded, or a run printed too much; retry_after says when to retry."""


class RunTimeoutError(MicrosandboxError, _TimeoutError):
    """-32007: the run reached its time limit and was interrupted. The session continues."""


class CommandNotFoundError(MicrosandboxError):
    """-32008: the sandbox has no such program."""


class RunFailedError(MicrosandboxError):
    """-32010: the run had begun, and failed in the sandbox or was lost. It may have taken effect."""


class CommandNotExecutableError(CommandNotFoundError):
    """-32011: the file exists in the sandbox but cannot be run."""


class UnavailableError(MicrosandboxError):
    """-32009: the server is starting or stopping, or the sandbox does not respond."""


class InternalError(MicrosandboxError):
    """-32603: an unexpected error; the server's log contains the cause under the request id."""


BY_CODE = {
    -32700: ParseError,
    -32600: InvalidRequestError,
    -32601: MethodNotFoundError,
    -32602: InvalidParamsError,
    -32002: AuthenticationError,
    -32003: SandboxNotFoundError,
    -32004: PermissionDeniedError,
    -32005: ConflictError,
    -32006: ResourceExhaustedError,
    -32007: RunTimeoutError,
    -32008: CommandNotFoundError,
    -32009: UnavailableError,
    -32010: RunFailedError,
    -32011: CommandNotExecutableError,
    -32603: InternalError,
}


# Errors of the program in the sandbox, which only raise_for_status raises.


class CodeError(MicrosandboxError):
    """The code raised an exception, or ended with an exit code other than 0.

    name, value and traceback are those of the exception, and empty if there was none.
    """

    name = ""
    value = ""
    traceback = ""

    @classmethod
    def of(cls, execution: Any) -> CodeError:
        """Return the error of an Execution."""
        exception = execution.exception
        what = f"{exception.name}: {exception.value}" if exception else f"the exit code is {execution.exit_code}"
        error = cls(f"the code failed: {what}")
        error.execution = execution
        if exception:
            error.name, error.value, error.traceback = exception.name, exception.value, exception.traceback
        return error


class CommandExitError(MicrosandboxError):
    """A command or a process ended with an exit code other than 0. exit_code is None if a process has not ended."""

    exit_code: int | None = None
    stdout = ""
    stderr = ""

    @classmethod
    def of(cls, execution: Any) -> CommandExitError:
        """Return the error of a CommandExecution or a ProcessResult."""
        code, stderr = execution.exit_code, execution.stderr
        what = "the process has not ended" if code is None else f"the exit code is {code}"
        last = stderr.rsplit("\n", 1)[-1]
        error = cls(what + (f": {last}" if last else ""))
        error.execution, error.exit_code, error.stdout, error.stderr = execution, code, execution.stdout, stderr
        return error


# Errors that this package detects itself.


class ConfigError(MicrosandboxError, ValueError):
    """The server's URL, the API key or a .env file cannot be used."""


class NotStartedError(MicrosandboxError):
    """The sandbox was not started, or was stopped."""


class ServerUnreachableError(MicrosandboxError, ConnectionError):
    """The connection to the server failed. Nothing was sent."""


class ConnectionLostError(MicrosandboxError, ConnectionError):
    """The connection ended before the response. The call may have taken effect."""


class RequestTimeoutError(MicrosandboxError, _TimeoutError):
    """No response arrived in time. The server interrupts the call. A process that was waited for goes on."""


class UnexpectedAnswerError(MicrosandboxError):
    """The response is not from msbd, but possibly from a proxy in front of it."""
