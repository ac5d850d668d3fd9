"""Fixtures of the unit and the live tests."""

from __future__ import annotations

from typing import Any

import pytest

from .flavours import FLAVOURS


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run coroutine tests in asyncio."""
    return "asyncio"


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: flavour.__name__)
def api(request: pytest.FixtureRequest) -> Any:
    """Return microsandbox or microsandbox.sync. Use done and entered to call both in the same way."""
    return request.param
