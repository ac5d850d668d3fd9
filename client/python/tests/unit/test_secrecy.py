"""Tests that the API key is sent and never shown."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import pytest

from microsandbox import MicrosandboxError, _config

from ..flavours import done
from .stub import LONG, TEST_KEY, Answer, Reply, Server, error_reply

pytestmark = pytest.mark.anyio


def shown(error: BaseException) -> str:
    """Return everything that a tool could show of an error: its chain, source lines, and each frame's variables."""
    text = traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return "".join(text) + repr(error) + repr(vars(error)) + repr(error.args)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("failure", ["refusal", "lost", "timeout", "unreachable"])
async def test_errors_and_logs(
    api: Any, server: Server, failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    replies: dict[str, Reply | Answer] = {
        "refusal": error_reply(401, -32002),
        "lost": server.drop,
        "timeout": server.hang,
    }
    server.answer("sandbox.start", replies.get(failure, server.hang))
    if failure == "unreachable":
        monkeypatch.setenv("MSB_SERVER_URL", "http://127.0.0.1:9")
    sandbox = api.PythonSandbox(name="my-env")
    with pytest.raises(MicrosandboxError) as caught:
        await done(sandbox.start(timeout=0.2 if failure == "timeout" else None))
    assert "sandbox.start" in shown(caught.value)  # checks that shown includes the variables of frames
    assert "connect_tcp.started" in caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    for text in (shown(caught.value), caplog.text, repr(sandbox), str(vars(sandbox)), repr(vars(sandbox._http))):
        assert TEST_KEY not in text
    if failure == "timeout":
        assert server.began.wait(LONG)
    if failure != "unreachable":
        assert server.requests[0].headers["authorization"] == f"Bearer {TEST_KEY}"


def test_attributes_of_version_0_1(api: Any) -> None:
    """Subclasses for version 0.1 use these attributes to send their own requests."""
    sandbox = api.PythonSandbox(name="my-env", server_url="http://127.0.0.1:7001/", api_key=TEST_KEY)
    assert (sandbox._server_url, sandbox._api_key) == ("http://127.0.0.1:7001", TEST_KEY)
    assert api.PythonSandbox()._api_key is None
    for attribute in ("_server_url", "_api_key"):
        with pytest.raises(AttributeError) as caught:
            setattr(sandbox, attribute, "hunter2")
        assert "hunter2" not in str(caught.value)
    for text in (repr(sandbox), str(vars(sandbox))):
        assert TEST_KEY not in text


def test_key() -> None:
    key = _config.Key(TEST_KEY)
    for text in (str(key), repr(key), f"{key}", f"{key!s:>20}", f"{key} {key!r}", str([key]), str({key: key})):
        assert TEST_KEY not in text
    assert not hasattr(key, "__dict__")
    assert TEST_KEY not in repr(_config.Config("http://127.0.0.1", key))
