"""Fixtures of the unit tests: an empty configuration, and a stub server."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microsandbox import _config, _http, _rpc

from .stub import TEST_KEY, Server


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remove all configuration: environment variables and .env files. Returns the test's directory."""
    work = tmp_path / "project" / "sub"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for name in list(os.environ):
        if name.startswith("MSB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # Pretend that the package is installed in a virtual environment there.
    package = tmp_path / "venv" / "lib" / "_config.py"
    package.parent.mkdir(parents=True)
    package.touch(mode=0o644)
    monkeypatch.setattr(_config, "__file__", str(package))
    return tmp_path


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit only the wait for responses, because a slow machine may not send the request within a short limit."""

    class Timeouts(_http.Timeouts):
        def get(self, step: str, default: Any = None) -> Any:
            return super().get(step, default) if step == "read" else default

    monkeypatch.setattr(_http, "Timeouts", Timeouts)


class Clock:
    """The clock for the time limits of calls. It does not advance unless a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(_rpc, "time", fake)
    return fake


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a stub server, and set its URL and an API key in the environment."""
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv(_config.SERVER_URL, running.url)
    monkeypatch.setenv(_config.API_KEY, TEST_KEY)
    yield running
    running.shutdown()
    running.server_close()
    thread.join()
    assert running.violations == []
