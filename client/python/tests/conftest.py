"""Fixtures of both suites."""

from __future__ import annotations

from typing import Any

import pytest

from .flavours import FLAVOURS


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run tests that are coroutines in asyncio."""
    return "asyncio"


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: flavour.__name__)
def api(request: pytest.FixtureRequest) -> Any:
    """Return the package, or its blocking version; see done and entered."""
    return request.param
