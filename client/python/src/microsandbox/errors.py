"""What can go wrong. Everything is a MicrosandboxError, and so a RuntimeError."""

from __future__ import annotations

import sys

if sys.version_info >= (3, 11):
    _TimeoutError = TimeoutError
else:
    import asyncio

    class _TimeoutError(TimeoutError, asyncio.TimeoutError):
        """Until Python 3.11, asyncio has a TimeoutError of its own."""


class MicrosandboxError(RuntimeError):
    """The base of all errors of this package. No error holds the API key.

    message: what happened and what to do about it; it is for people and may change.
    code: the JSON-RPC error code, None if the server told none.
    status: the HTTP status, None if there was no answer.
    request_id: finds the request in the server's log; None if there was no answer.
    retry_after: seconds that the server asks to wait; None if it did not say.
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

    def __str__(self) -> str:
        return f"{self.message} (request id {self.request_id})" if self.request_id else self.message


# What the server tells, one for each of its error codes.


class ParseError(MicrosandboxError):
    """-32700: the request is not strict JSON, as with half a surrogate pair in the code."""


class InvalidRequestError(MicrosandboxError):
    """-32600: not a request, as when it is longer than 1 MiB, or the URL's path is not the server's."""


class MethodNotFoundError(MicrosandboxError):
    """-32601: the server has no such method: it is older than this package."""


class InvalidParamsError(MicrosandboxError, ValueError):
    """-32602: a parameter is wrong, out of range or not supported; the message names it.

    Its code is None for what is found before anything is sent, as a timeout that is no number.
    """


class AuthenticationError(MicrosandboxError):
    """-32002: there is no key, or it is malformed, expired, revoked or unknown."""


class PermissionDeniedError(MicrosandboxError):
    """-32004: the key is good, but limited to another namespace or to other methods."""


class SandboxNotFoundError(MicrosandboxError):
    """-32003: there is no such sandbox."""


class ConflictError(MicrosandboxError):
    """-32005: the sandbox runs with another configuration, or is in the wrong state."""


class ResourceExhaustedError(MicrosandboxError):
    """-32006: over a quota or a rate limit; retry_after says when to come back."""


class RunTimeoutError(MicrosandboxError, _TimeoutError):
    """-32007: the run reached its time limit and was interrupted. The session goes on."""


class CommandNotFoundError(MicrosandboxError):
    """-32008: the sandbox has no such program."""


class UnavailableError(MicrosandboxError):
    """-32009: the server starts or stops, or the sandbox does not answer."""


class InternalError(MicrosandboxError):
    """-32603: unforeseen; the server's log has the cause under the request id."""


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
    -32603: InternalError,
}


# What this side finds by itself.


class ConfigError(MicrosandboxError, ValueError):
    """The server's URL, the API key or a .env file cannot be used as it is."""


class NotStartedError(MicrosandboxError):
    """The sandbox was not started, or was stopped."""


class ServerUnreachableError(MicrosandboxError, ConnectionError):
    """There is no connection to the server: nothing was sent."""


class ConnectionLostError(MicrosandboxError, ConnectionError):
    """The connection ended before the answer came: what was asked for may have happened, or not."""


class RequestTimeoutError(MicrosandboxError, _TimeoutError):
    """No answer came in time. The server interrupts what was asked for."""


class UnexpectedAnswerError(MicrosandboxError):
    """The answer is not that of msbd, but perhaps of a proxy before it."""
