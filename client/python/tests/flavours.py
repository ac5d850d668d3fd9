"""Helpers for tests that run with both microsandbox and microsandbox.sync."""

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
    """Return the result of a method call, awaiting it if the method is async."""
    return await value if inspect.isawaitable(value) else value


def begin(method: Any, *args: Any) -> asyncio.Task[Any]:
    """Call a method concurrently with the test: an async method in a task, a blocking one in a thread."""
    call = method(*args) if inspect.iscoroutinefunction(method) else asyncio.to_thread(method, *args)
    return asyncio.create_task(call)


@asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    """Enter an async or a blocking context manager."""
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def everything(stream: Any) -> list[Any]:
    """Return all items of a stream."""
    return [item async for item in items(stream)]


async def items(stream: Any) -> AsyncIterator[Any]:
    """Iterate over a stream of either flavour."""
    if hasattr(stream, "__aiter__"):
        async for item in stream:
            yield item
    else:
        for item in stream:
            yield item
