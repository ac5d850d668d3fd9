"""JSON-RPC without the transport: encodes calls, decodes responses, and decides what is retried."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Generic, TypeVar

from .errors import (
    BY_CODE,
    AuthenticationError,
    ConnectionLostError,
    MicrosandboxError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServerUnreachableError,
    UnavailableError,
    UnexpectedAnswerError,
)

PATH = "/api/v1/rpc"

T = TypeVar("T")

# The maximum number of attempts of a call that did not begin or is safe to repeat, and the pauses between the
# attempts in seconds.
MAX_ATTEMPTS = 3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0

# The maximum number of seconds that timers and sockets accept, about 24 days.
MAX_SECONDS = (2**31 - 1) / 1000


class Deadline:
    """The deadline of a call, for all of its attempts and the pauses between them."""

    def __init__(self, limit: float | None) -> None:
        self._at = math.inf if limit is None else time.monotonic() + min(limit, MAX_SECONDS)

    def remaining(self) -> float:
        """Return the seconds that remain; infinity without a limit."""
        return self._at - time.monotonic()

    def expired(self) -> bool:
        """Report whether no time remains for another attempt. The margin allows for timers that fire early."""
        return self.remaining() < _FIRST_PAUSE


@dataclass(frozen=True)
class Call:
    """One call of a method.

    limit: total seconds to wait for a response, over all attempts; None means no limit.
    idempotent: making the call twice does no harm.
    stream: the response is a stream of events.
    overdue: what has not happened when the limit is reached.
    """

    method: str
    params: dict[str, Any]
    limit: float | None
    idempotent: bool = False
    stream: bool = False
    overdue: str = "no answer"
    verb: str = "POST"
    path: str = PATH

    def headers(self) -> dict[str, str]:
        """Return the headers of the request."""
        headers = {"Content-Type": "application/json"}
        return {**headers, "Accept": "text/event-stream"} if self.stream else headers

    def body(self) -> bytes:
        """Return the request. It may contain half a surrogate pair, which the server refuses with an explanation."""
        request = {"jsonrpc": "2.0", "method": self.method, "params": self.params, "id": 1}
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    def pause(self, error: MicrosandboxError, attempt: int, remaining: float) -> float | None:
        """Return the seconds to wait before a retry.

        None if the call must not be retried, or if the pause is not shorter than the remaining time.
        """
        # With Retry-After, 429 means that the server refused the call before it began. Without it, 429 can also mean
        # that the run began and was ended because it printed too much.
        refused = error.status == 429 and error.retry_after is not None
        not_begun = refused or isinstance(error, ServerUnreachableError)
        harmless = self.idempotent and (isinstance(error, ConnectionLostError) or error.status in (429, 503))
        if attempt >= MAX_ATTEMPTS or not (not_begun or harmless):
            return None
        pause: float = max(_FIRST_PAUSE * 2 ** (attempt - 1), error.retry_after or 0)
        if pause > _LONGEST_PAUSE:
            return None
        pause *= random.uniform(1, 1.25)  # noqa: S311  so that many clients do not retry at the same time
        return pause if pause < remaining else None


@dataclass(frozen=True)
class Transfer(Call):
    """A request for a file or a tree. method is its name in errors, and params is empty."""

    fields: dict[str, str] = field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        """Return the headers of the request."""
        return {"Accept-Encoding": "identity", **self.fields}

    def body(self) -> bytes:
        """Return the body of a request that sends no file."""
        return b""


# What the caller can do about a refused key. The server's text is about the HTTP header, but programs look for its
# first words.
_NO_KEY = (
    "missing or invalid API key. No API key was sent: "
    "pass api_key, or set MSB_API_KEY in the environment or a .env file"
)
_BAD_KEY = "missing or invalid API key: check api_key or MSB_API_KEY"


def result(status: int, headers: Mapping[str, str], body: bytes, *, keyless: bool = False) -> Any:
    """Return the result in a response, or raise its error. keyless: the call was sent without an API key."""
    answer = json_object(headers, body)
    if status == 200 and "result" in answer:
        return answer["result"]
    raise failure(status, headers, body, keyless=keyless)


def json_object(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Return the JSON object in a response; an empty one if there is none."""
    answer: Any = None
    if _media_type(headers) == "application/json":
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
    return answer if isinstance(answer, dict) else {}


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").split(";")[0].strip().lower()


def failure(status: int, headers: Mapping[str, str], body: bytes, *, keyless: bool = False) -> MicrosandboxError:
    """Return the error in a response that is not a result."""
    error = server_error(json_object(headers, body).get("error"), status, headers, keyless=keyless)
    return error or _not_from_msbd_error(status, headers, body)


def server_error(
    error: Any, status: int | None, headers: Mapping[str, str], *, keyless: bool = False
) -> MicrosandboxError | None:
    """Convert an error of the server. Return None if it is not one."""
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        return None
    kind = BY_CODE.get(error["code"], MicrosandboxError)
    message = str(error.get("message"))
    if kind is AuthenticationError:
        message = _NO_KEY if keyless else _BAD_KEY
    converted = _error(kind, message, status, headers, error["code"])
    if isinstance(error.get("data"), dict):
        converted._data = error["data"]
    return converted


# The errors for the statuses of responses that are not from msbd, such as those of proxies.
_BY_STATUS = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    429: ResourceExhaustedError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def _not_from_msbd_error(status: int, headers: Mapping[str, str], body: bytes) -> MicrosandboxError:
    """Return the error for a response that is not from msbd."""
    text = (
        f"the response (HTTP status {status}) is not from msbd: "
        "check the server's URL and the logs of any proxy in front of the server"
    )
    if 300 <= status < 400 and "location" in headers:
        text = (
            f"the server redirects to {headers['location']!r}. Redirects are not followed, because the API key "
            "would be sent along: set the server's URL to the right one"
        )
    elif body.startswith(b"Client sent an HTTP request to an HTTPS server"):
        text = "the server speaks TLS: use https:// in its URL"
    return _error(_BY_STATUS.get(status, UnexpectedAnswerError), text, status, headers, None)


def _error(
    kind: type[MicrosandboxError],
    message: str,
    status: int | None,
    headers: Mapping[str, str],
    code: int | None,
) -> MicrosandboxError:
    return kind(
        message,
        code=code,
        status=status,
        request_id=headers.get("x-request-id"),
        retry_after=_retry_after(headers.get("retry-after")),
    )


def _retry_after(header: str | None) -> float | None:
    """Parse the Retry-After header, which is a number of seconds or a date. Returns seconds."""
    if not header:
        return None
    try:
        return max(0.0, float(int(header)))
    except ValueError:
        pass
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    try:
        at = parsedate_to_datetime(header)
    except (TypeError, ValueError):  # before Python 3.10, it raises TypeError
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return max(0.0, (at - datetime.now(timezone.utc)).total_seconds())


class EventReader(Generic[T]):
    """Parses a stream of server-sent events and converts each to items. The last event is "result" or "error"."""

    def __init__(self, call: Call, convert: Callable[[str, Any], Iterable[T]]) -> None:
        self._call = call
        self._convert = convert
        self._headers: Mapping[str, str] = {}
        self._buffer = bytearray()
        self._searched = 0  # the bytes of the buffer that contain no newline
        self._name = ""
        self._data: list[bytes] = []
        self._failure: MicrosandboxError | None = None
        self.items: deque[T] = deque()
        self.begun = False  # whether an event has arrived
        self.ended = False  # whether nothing follows the items

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Check that a response is a stream of events."""
        if _media_type(headers) != "text/event-stream":
            raise UnexpectedAnswerError(
                f"{self._call.method}: the response is not a stream of events; check any proxy in front of the server",
                status=status,
            )
        self._headers = headers

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the stream; b"" at its end."""
        if not chunk and not self.ended:
            self._end(
                ConnectionLostError(
                    f"{self._call.method}: the stream ended before its result, because the connection was lost "
                    "or the API key is no longer valid: the call may have taken effect"
                )
            )
        self._buffer += chunk
        begin = 0
        while not self.ended:
            end = self._buffer.find(b"\n", max(begin, self._searched))
            if end < 0:
                break
            self._line(bytes(self._buffer[begin:end]).rstrip(b"\r"))
            begin = end + 1
        del self._buffer[:begin]
        self._searched = len(self._buffer)

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"event":
            self._name = value.decode("utf-8", "replace")
        elif name == b"data":
            self._data.append(value)
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            self._event(self._name, data)

    def _event(self, name: str, data: bytes) -> None:
        self.begun = True
        try:
            value = json.loads(data)
        except ValueError:
            value, name = None, "error"
        if name == "error":
            # An error in a stream has no status, because the status 200 was sent before.
            unknown = UnexpectedAnswerError(f"{self._call.method}: the stream has an event in an unexpected format")
            self._end(server_error(value, None, self._headers) or unknown)
            return
        self.items.extend(self._convert(name, value))
        self.ended = name == "result"

    def _end(self, failure: MicrosandboxError) -> None:
        self._failure = failure
        self.begun = self.ended = True

    def check(self) -> None:
        """Raise the error with which the stream ended, if any."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
