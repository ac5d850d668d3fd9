"""The resource usage of a sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._core import metrics_result
from ._results import SandboxMetrics
from .errors import SandboxNotFoundError

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Metrics:
    """The resource usage of a sandbox. Each method requests it from the server."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def all(self) -> SandboxMetrics:
        """Return all metrics as a dict. Raises SandboxNotFoundError if the sandbox does not exist."""
        return metrics_result(await self._sandbox._http.call(self._sandbox._metrics_call()))

    async def cpu(self) -> float | None:
        """Return the CPU usage, in percent of one processor."""
        return (await self.all())["cpu_usage"]

    async def memory(self) -> int | None:
        """Return the memory usage, in MiB."""
        return (await self.all())["memory_usage"]

    async def disk(self) -> int | None:
        """Return the disk usage, in bytes."""
        return (await self.all())["disk_usage"]

    async def is_running(self) -> bool:
        """Report whether the sandbox is running. False if it does not exist."""
        try:
            return (await self.all())["running"]
        except SandboxNotFoundError:
            return False
