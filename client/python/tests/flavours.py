"""The two ways to use the package, so that one test holds for both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import microsandbox
import microsandbox.sync

FLAVOURS = [microsandbox, microsandbox.sync]


async def done(value: Any) -> Any:
    """Return what a method returns, in asyncio or blocking."""
    return await value if inspect.isawaitable(value) else value


def begin(method: Any, *args: Any) -> asyncio.Task[Any]:
    """Call a method beside what the test does: in a task, or in a thread."""
    call = method(*args) if inspect.iscoroutinefunction(method) else asyncio.to_thread(method, *args)
    return asyncio.create_task(call)


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    """Enter a context manager of either kind."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value
