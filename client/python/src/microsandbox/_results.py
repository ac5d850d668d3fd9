"""The server's results, as far as asyncio and blocking code share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict


class OutputLine(TypedDict):
    """A line of a run's output, without the newline. stream is stdout or stderr."""

    stream: str
    text: str


class _Failure(TypedDict, total=False):
    reason: str  # only of a failed sandbox: why it failed


class SandboxInfo(_Failure):
    """What the server knows about a sandbox. It has a reason if its state is failed."""

    namespace: str
    name: str
    id: str  # differs for each start of the sandbox
    state: str  # starting, running, stopping or failed
    image: str
    cpus: int
    memory: int  # MiB
    created_at: str  # the time of the start in UTC, such as 2026-01-02T03:04:05Z


class SandboxMetrics(_Failure):
    """The resource usage of a sandbox. The usages are None if it is not running, or if they could not be measured."""

    namespace: str
    name: str
    state: str  # as in SandboxInfo
    running: bool
    cpu_usage: float | None  # percent of one processor
    memory_usage: int | None  # MiB
    disk_usage: int | None  # bytes


class Output:
    """The output of a run."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.lines: list[OutputLine] = list(data.get("output") or ())

    @property
    def stdout(self) -> str:
        """The standard output, without trailing white space."""
        return self._text("stdout")

    @property
    def stderr(self) -> str:
        """The standard error, without trailing white space."""
        return self._text("stderr")

    @property
    def text(self) -> str:
        """Both, in the order of lines, without trailing white space. print(result) prints it."""
        return self._text("stdout", "stderr")

    def __str__(self) -> str:
        return self.text

    def _text(self, *streams: str) -> str:
        return "\n".join(line.get("text", "") for line in self.lines if line.get("stream") in streams).rstrip()


class ExecutionData(Output):
    """The status and the output of a run of code."""

    def __init__(self, output_data: dict[str, Any] | None = None) -> None:
        """Parse a result of sandbox.repl.run."""
        data = output_data if isinstance(output_data, dict) else {}
        super().__init__(data)
        self._status = str(data.get("status", "unknown"))
        self._language = str(data.get("language", "unknown"))

    @property
    def status(self) -> str:
        """success, or error if the code raised an exception."""
        return self._status

    @property
    def language(self) -> str:
        """The language of the code."""
        return self._language

    def has_error(self) -> bool:
        """Report whether the code raised an exception or printed to standard error."""
        return self._status in ("error", "exception") or any(
            line.get("stream") == "stderr" and line.get("text") for line in self.lines
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._language} {self._status}>"


class CommandExecutionData(Output):
    """The exit code and the output of a command."""

    def __init__(self, output_data: dict[str, Any] | None = None) -> None:
        """Parse a result of sandbox.command.run."""
        data = output_data if isinstance(output_data, dict) else {}
        super().__init__(data)
        self._command = str(data.get("command", ""))
        self._args: list[str] = list(data.get("args") or ())
        self._exit_code = int(data.get("exit_code", -1))
        self._success = bool(data.get("success", False))

    @property
    def command(self) -> str:
        """The program that ran."""
        return self._command

    @property
    def args(self) -> list[str]:
        """Its arguments."""
        return self._args

    @property
    def exit_code(self) -> int:
        """The exit code of the program."""
        return self._exit_code

    @property
    def success(self) -> bool:
        """Whether the exit code is 0."""
        return self._success

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._command!r} exit_code={self._exit_code}>"
