"""Tests against a real server: MSB_SERVER_URL is its URL, MSB_API_KEY an API key without limits.

The server needs the images microsandbox/python and microsandbox/node. The tests share sandboxes, because
starting one takes seconds. A test that breaks its sandbox starts its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

import microsandbox
from microsandbox.sync import NodeSandbox, PythonSandbox


def pytest_configure() -> None:
    missing = [name for name in ("MSB_SERVER_URL", "MSB_API_KEY") if not os.environ.get(name)]
    if missing:
        raise pytest.UsageError(f"tests/live needs a running server: set {' and '.join(missing)}")


@pytest.fixture(scope="session")
def python_name() -> Iterator[str]:
    """Start a Python sandbox. Returns its name."""
    with PythonSandbox.create(name=f"live-python-{os.getpid()}") as sandbox:
        yield sandbox.name


@pytest.fixture(scope="session")
def node_name() -> Iterator[str]:
    """Start a JavaScript sandbox. Returns its name."""
    with NodeSandbox.create(name=f"live-node-{os.getpid()}") as sandbox:
        yield sandbox.name


@pytest.fixture
def api(request: pytest.FixtureRequest) -> Any:
    """Return microsandbox, or the flavour that the test is parametrized with.

    The unit tests run with both flavours. With real sandboxes, a second run of each test would find nothing new.
    """
    return getattr(request, "param", microsandbox)
