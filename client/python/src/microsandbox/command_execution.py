"""The result of a command."""

from ._results import CommandExecutionData


class CommandExecution(CommandExecutionData):
    """The exit code and the output of a command."""

    async def output(self) -> str:
        """Return stdout. It does not wait; the method is async for compatibility with version 0.1."""
        return self.stdout

    async def error(self) -> str:
        """Return stderr. It does not wait; the method is async for compatibility with version 0.1."""
        return self.stderr
