"""The result of a run of code."""

from ._results import ExecutionData


class Execution(ExecutionData):
    """How a run of code ended, and what it printed."""

    async def output(self) -> str:
        """Return stdout. It is here already; nothing is waited for."""
        return self.stdout

    async def error(self) -> str:
        """Return stderr. It is here already; nothing is waited for."""
        return self.stderr
