"""The result of a command."""

from ._results import CommandExecutionData


class CommandExecution(CommandExecutionData):
    """How a command ended, and what it printed."""

    async def output(self) -> str:
        """Return stdout. It is here already; nothing is waited for."""
        return self.stdout

    async def error(self) -> str:
        """Return stderr. It is here already; nothing is waited for."""
        return self.stderr
