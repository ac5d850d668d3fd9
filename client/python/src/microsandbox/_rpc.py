"""JSON-RPC without the sending: what a call says, what an answer means, what is sent again."""

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

# How often a call is sent that surely, or harmlessly, did not run before; and the pauses between, in seconds.
MAX_ATTEMPTS = 3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0

# Seconds that timers and sockets take at most, 24 days.
LONGEST = (2**31 - 1) / 1000


class Deadline:
    """The end of a call's limit: one for all of its attempts, and for the pauses between."""

    def __init__(self, limit: float | None) -> None:
        self._at = math.inf if limit is None else time.monotonic() + min(limit, LONGEST)

    def left(self) -> float:
        """Return the seconds that are left; infinity without a limit."""
        return self._at - time.monotonic()

    def over(self) -> bool:
        """Say whether there is no time for another attempt; timers may also end a call a little early."""
        return self.left() < _FIRST_PAUSE


@dataclass(frozen=True)
class Call:
    """One call of a method.

    limit: seconds to wait for the answer, all attempts together; None is as long as the caller likes.
    repeatable: a second run of it does no harm.
    """

    method: str
    params: dict[str, Any]
    limit: float | None
    repeatable: bool = False

    def body(self) -> bytes:
        """Return the request. The server explains what is wrong with half a surrogate pair."""
        request = {"jsonrpc": "2.0", "method": self.method, "params": self.params, "id": 1}
        return json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    def pause(self, error: MicrosandboxError, attempt: int, left: float) -> float | None:
        """Return the seconds to wait before the call is sent again; None if it must not be, or left is too short."""
        # 429: the server has turned it away, and begun nothing. Without a time to come back, it is also the answer to
        # a run that began, and was ended since it printed too much.
        unbegun = isinstance(error, ServerUnreachableError) or (error.status == 429 and error.retry_after is not None)
        harmless = self.repeatable and (isinstance(error, ConnectionLostError) or error.status in (429, 503))
        if attempt >= MAX_ATTEMPTS or not (unbegun or harmless):
            return None
        pause: float = max(_FIRST_PAUSE * 2 ** (attempt - 1), error.retry_after or 0)
        if pause > _LONGEST_PAUSE:
            return None
        pause *= random.uniform(1, 1.25)  # noqa: S311  so that many do not come back at once
        return pause if pause < left else None


def result(status: int, headers: Mapping[str, str], body: bytes, *, keyless: bool = False) -> Any:
    """Return what an answer holds, or raise the error that it tells. keyless: the call had no API key."""
    answer: Any = None
    if headers.get("content-type", "").split(";")[0].strip().lower() == "application/json":
        with contextlib.suppress(ValueError):
            answer = json.loads(body)
    if isinstance(answer, dict):
        error = answer.get("error")
        if isinstance(error, dict) and isinstance(error.get("code"), int):
            kind = BY_CODE.get(error["code"], MicrosandboxError)
            message = str(error.get("message"))
            if kind is AuthenticationError and keyless:
                message += ". None was sent: pass api_key, or set MSB_API_KEY in the environment or in a .env file"
            raise _error(kind, message, status, headers, error["code"])
        if status == 200 and "result" in answer:
            return answer["result"]
    raise _foreign(status, headers, body)


# How proxies answer.
_BY_STATUS = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    429: ResourceExhaustedError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def _foreign(status: int, headers: Mapping[str, str], body: bytes) -> MicrosandboxError:
    text = (
        f"the answer (HTTP status {status}) is not that of msbd; "
        "see whether the server's URL is right, and what a proxy before it says"
    )
    if 300 <= status < 400 and "location" in headers:
        text = (
            f"the server sends on to {headers['location']!r}; that is not followed, "
            "since the API key would go along: use the URL that is meant"
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
    """Read the header of this name, in seconds or as a date."""
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
    except (TypeError, ValueError):  # TypeError: until Python 3.10
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=timezone.utc)
    return max(0.0, (at - datetime.now(timezone.utc)).total_seconds())
