"""Tests that each of the server's error codes has its exception, and that the server's transcripts are parsed."""

from __future__ import annotations

import asyncio
import json
import pickle
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

import microsandbox
from microsandbox import MicrosandboxError, RequestTimeoutError, RunTimeoutError, errors
from microsandbox._rpc import result

TRANSCRIPTS = Path(__file__).parents[4] / "daemon/internal/serve/rpc/testdata"
JSON = {"content-type": "application/json; charset=utf-8"}

CODES = {
    -32700: "ParseError",
    -32600: "InvalidRequestError",
    -32601: "MethodNotFoundError",
    -32602: "InvalidParamsError",
    -32002: "AuthenticationError",
    -32003: "SandboxNotFoundError",
    -32004: "PermissionDeniedError",
    -32005: "ConflictError",
    -32006: "ResourceExhaustedError",
    -32007: "RunTimeoutError",
    -32008: "CommandNotFoundError",
    -32009: "UnavailableError",
    -32010: "RunFailedError",
    -32011: "CommandNotExecutableError",
    -32603: "InternalError",
    -32099: "MicrosandboxError",
}


def failure(status: int, headers: dict[str, str], body: str) -> MicrosandboxError:
    with pytest.raises(MicrosandboxError) as caught:
        result(status, headers, body.encode())
    return caught.value


@pytest.mark.parametrize("code", CODES)
def test_code(code: int) -> None:
    body = json.dumps({"jsonrpc": "2.0", "error": {"code": code, "message": "it is so", "data": {}}, "id": 1})
    error = failure(599, {**JSON, "x-request-id": "ABC", "retry-after": "7"}, body)
    assert type(error).__name__ == CODES[code]
    assert type(error) is getattr(microsandbox, CODES[code])
    assert isinstance(error, RuntimeError)  # as in version 0.1
    assert (error.code, error.status, error.request_id, error.retry_after) == (code, 599, "ABC", 7.0)
    # The server's text about a key names the HTTP header, which users of this package do not set.
    said = "missing or invalid API key: check api_key or MSB_API_KEY" if code == -32002 else "it is so"
    assert error.message == said
    assert str(error) == f"{said} (request id ABC)"


def test_all_exceptions_are_public_and_can_be_pickled() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MicrosandboxError)]
    assert len(kinds) > 20
    for kind in kinds:
        assert getattr(microsandbox, kind.__name__) is kind
        error = kind("it is so", code=-1, status=400, request_id="ABC", retry_after=1.5)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert vars(again) == vars(error)
        assert str(again) == str(error)


def test_builtin_classes() -> None:
    for kind in (RunTimeoutError, RequestTimeoutError):
        assert issubclass(kind, TimeoutError)
        assert issubclass(kind, asyncio.TimeoutError)
    assert issubclass(microsandbox.ServerUnreachableError, ConnectionError)
    assert issubclass(microsandbox.ConnectionLostError, ConnectionError)
    assert issubclass(microsandbox.ConfigError, ValueError)


def golden() -> list[tuple[int, str]]:
    """Return the responses in the gateway's transcripts, except those to batches and those without a body."""
    answers = []
    for file in sorted(TRANSCRIPTS.glob("*.txt")):
        for line in file.read_text("utf-8").split("\n"):
            if line.startswith("< ") and "{" in line[:7]:
                status, body = line[2:].split(" ", 1)
                answers.append((int(status), body))
    return answers


def test_golden_answers() -> None:
    """The transcripts contain the responses of the real server."""
    codes = {}
    for status, body in golden():
        want = json.loads(body)
        if "result" in want:
            assert result(status, JSON, body.encode()) == want["result"]
            continue
        error = failure(status, {**JSON, "x-request-id": "ABC"}, body)
        assert (error.code, error.message, error.status) == (want["error"]["code"], want["error"]["message"], status)
        codes[error.code] = type(error).__name__
    assert len(codes) >= 9
    assert codes.items() <= CODES.items()


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "says"),
    [
        (200, {}, "<html>", "UnexpectedAnswerError", "HTTP status 200"),
        (200, JSON, '{"message":"hello"}', "UnexpectedAnswerError", "not from msbd"),
        (200, JSON, '{"jsonrpc":"2.0","result":"Sand', "UnexpectedAnswerError", "not from msbd"),
        (200, JSON, "[]", "UnexpectedAnswerError", "not from msbd"),
        (200, JSON, '{"error":{"code":"x"}}', "UnexpectedAnswerError", "not from msbd"),
        (200, {}, '{"jsonrpc":"2.0","result":1}', "UnexpectedAnswerError", "not from msbd"),
        (200, JSON, "\udcff", "UnexpectedAnswerError", "not from msbd"),
        (204, {}, "", "UnexpectedAnswerError", "HTTP status 204"),
        (201, JSON, '{"jsonrpc":"2.0","result":1}', "UnexpectedAnswerError", "HTTP status 201"),
        (307, {"location": "https://a"}, "", "UnexpectedAnswerError", "redirects to 'https://a'"),
        (400, {}, "Client sent an HTTP request to an HTTPS server.\n", "UnexpectedAnswerError", "use https://"),
        (401, JSON, '{"message":"no"}', "AuthenticationError", "HTTP status 401"),
        (403, JSON, '{"message":"blocked"}', "PermissionDeniedError", "HTTP status 403"),
        (429, {}, "", "ResourceExhaustedError", "HTTP status 429"),
        (502, {}, "<html>", "UnavailableError", "HTTP status 502"),
        (504, {}, "<html>", "UnavailableError", "HTTP status 504"),
    ],
)
def test_foreign_responses(status: int, headers: dict[str, str], body: str, kind: str, says: str) -> None:
    with pytest.raises(MicrosandboxError, match=says) as caught:
        result(status, headers, body.encode("utf-8", "surrogateescape"))
    assert type(caught.value).__name__ == kind
    assert (caught.value.code, caught.value.status, caught.value.request_id) == (None, status, None)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0", 0.0), ("1", 1.0), ("-5", 0.0), ("", None), ("soon", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)],
)
def test_retry_after(header: str, seconds: Any) -> None:
    assert failure(503, {"retry-after": header}, "").retry_after == seconds


def test_retry_after_a_date() -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(hours=1), usegmt=True)
    seconds = failure(503, {"retry-after": date}, "").retry_after
    assert seconds is not None
    assert 3500 < seconds <= 3600
