"""What a sandbox uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._core import metrics_result
from ._results import SandboxMetrics
from .errors import SandboxNotFoundError

if TYPE_CHECKING:
    from .base_sandbox import BaseSandbox


class Metrics:
    """Asks what a sandbox uses, at each call anew."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    async def all(self) -> SandboxMetrics:
        """Return all metrics at once, a dict. Raises SandboxNotFoundError when the sandbox is gone."""
        return metrics_result(await self._sandbox._http.call(self._sandbox._metrics_call()))

    async def cpu(self) -> float | None:
        """Return the processor time that it uses, in percent of one processor."""
        return (await self.all())["cpu_usage"]

    async def memory(self) -> int | None:
        """Return the memory that it uses, in MiB."""
        return (await self.all())["memory_usage"]

    async def disk(self) -> int | None:
        """Return the disk space that it uses, in bytes."""
        return (await self.all())["disk_usage"]

    async def is_running(self) -> bool:
        """Say whether the sandbox runs."""
        try:
            return (await self.all())["running"]
        except SandboxNotFoundError:
            return False
