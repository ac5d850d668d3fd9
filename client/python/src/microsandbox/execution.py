"""The result of a run of code."""

from ._results import ExecutionData


class Execution(ExecutionData):
    """The status and the output of a run of code."""

    async def output(self) -> str:
        """Return stdout. It does not wait; the method is async for compatibility with version 0.1."""
        return self.stdout

    async def error(self) -> str:
        """Return stderr. It does not wait; the method is async for compatibility with version 0.1."""
        return self.stderr
