"""JSON-RPC without the transport: encodes calls, decodes responses, and decides what is retried."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    """

    method: str
    params: dict[str, Any]
    limit: float | None
    idempotent: bool = False

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


# What the caller can do about a refused key. The server's text is about the HTTP header, but programs look for its
# first words.
_NO_KEY = (
    "missing or invalid API key. No API key was sent: "
    "pass api_key, or set MSB_API_KEY in the environment or a .env file"
)
_BAD_KEY = "missing or invalid API key: check api_key or MSB_API_KEY"


def result(status: int, headers: Mapping[str, str], body: bytes, *, keyless: bool = False) -> Any:
    """Return the result in a response, or raise its error. keyless: the call was sent without an API key."""
    answer: Any = None
    if headers.get("content-type", "").split(";")[0].strip().lower() == "application/json":
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
    if isinstance(answer, dict):
        error = answer.get("error")
        if isinstance(error, dict) and isinstance(error.get("code"), int):
            kind = BY_CODE.get(error["code"], MicrosandboxError)
            message = str(error.get("message"))
            if kind is AuthenticationError:
                message = _NO_KEY if keyless else _BAD_KEY
            raise _error(kind, message, status, headers, error["code"])
        if status == 200 and "result" in answer:
            return answer["result"]
    raise _not_from_msbd_error(status, headers, body)


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
    status: int,
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
