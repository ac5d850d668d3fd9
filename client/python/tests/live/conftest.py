"""The suite for a real server: MSB_SERVER_URL names it, MSB_API_KEY is a key of it for everything.

The server needs the images microsandbox/python and microsandbox/node. Sandboxes that take seconds to start
are shared; each test that breaks one has its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from microsandbox.sync import NodeSandbox, PythonSandbox


def pytest_configure() -> None:
    missing = [name for name in ("MSB_SERVER_URL", "MSB_API_KEY") if not os.environ.get(name)]
    if missing:
        raise pytest.UsageError(f"tests/live needs a running server: set {' and '.join(missing)}")


@pytest.fixture(scope="session")
def python_name() -> Iterator[str]:
    """Start a sandbox for Python; returns its name."""
    with PythonSandbox.create(name=f"live-python-{os.getpid()}") as sandbox:
        yield sandbox.name


@pytest.fixture(scope="session")
def node_name() -> Iterator[str]:
    """Start a sandbox for JavaScript; returns its name."""
    with NodeSandbox.create(name=f"live-node-{os.getpid()}") as sandbox:
        yield sandbox.name
