"""The server's results, as far as asyncio and blocking code share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, TypeVar

from .errors import CodeError, CommandExitError

ExecutionT = TypeVar("ExecutionT", bound="ExecutionData")
CommandT = TypeVar("CommandT", bound="CommandExecutionData")


class OutputLine(TypedDict):
    """A line of a run's output, without the newline. stream is stdout, stderr or, of a terminal, terminal."""

    stream: str
    text: str


class _Failure(TypedDict, total=False):
    reason: str  # only of a failed sandbox: why it failed


class _Disk(TypedDict, total=False):
    disk: int  # MiB: the size of the writable disk; only if it is limited


class StartedFrom(TypedDict, total=False):
    """How a sandbox was started."""

    source: str  # pool, template or cold; later servers may have others
    why: str  # why the start was not faster; only if it is not from the pool


class _Origin(TypedDict, total=False):
    started_from: StartedFrom  # only of a sandbox that has started, and not if an earlier server started it


class SandboxInfo(_Failure, _Disk, _Origin):
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


class _Exit(TypedDict, total=False):
    signal: str  # only if a signal ended the process: its name, such as KILL
    reason: str  # only if memory ran out: why the kernel killed the process


class ProcessExit(_Exit):
    """How a process has ended."""

    exit_code: int  # 128+N if signal N ended the process
    timed_out: bool  # whether the process reached its time limit


class _Process(TypedDict, total=False):
    tag: str
    exit: ProcessExit  # only of a process that has ended


class ProcessInfo(_Process):
    """What the server knows about a process of sandbox.process or sandbox.pty, or about an interpreter."""

    pid: int
    command: str
    args: list[str]
    cwd: str
    user: str
    terminal: bool  # whether it has a terminal
    started_at: str  # in UTC, such as 2026-01-02T03:04:05Z
    running: bool
    output_bytes: int  # how much it has printed


class _File(TypedDict, total=False):
    link_target: str  # only of a symbolic link: what it contains
    target: dict[str, Any]  # only of a symbolic link that leads to a file: the FileInfo of that file
    created: bool  # only of mkdir: whether the directory did not exist before


class FileInfo(_File):
    """What the server knows about a file. Bytes of a path that are not UTF-8 are as from os.fsdecode."""

    path: str
    type: str  # file, directory, symlink or other
    size: int  # bytes
    mode: str  # the permissions in octal, such as 0644
    uid: int
    gid: int
    user: str  # the name in the sandbox, or ""
    group: str
    modified_at: str  # in UTC, such as 2026-01-02T03:04:05.678Z


class FileChange(NamedTuple):
    """A change of a file. path is relative to the path that is watched, which itself is the empty path.

    type is create, write, remove, rename, chmod, or overflow if there were too many changes to report all.
    """

    type: str
    path: str


class Piece(NamedTuple):
    """A piece of the output of a process.

    stream is stdout, stderr or terminal. data has the bytes as they were printed. In text, a character whose bytes
    are in two pieces is part of the second one, and bytes that are not UTF-8 are replaced.
    """

    stream: str
    data: bytes
    text: str


@dataclass(frozen=True)
class Context:
    """A context: a session of an interpreter that runs code in one language."""

    name: str
    language: str
    cwd: str | None  # the directory in which the interpreter starts, if one was given
    pid: int | None  # None if the interpreter does not run
    count: int  # how many runs the interpreter has begun
    busy: bool  # whether a run is in progress


@dataclass(frozen=True)
class CodeException:
    """An exception that code in a sandbox has raised."""

    name: str
    value: str
    traceback: str


class Result:
    """A value that code has shown, in all the formats in which it can be shown.

    Each format is None if the value does not have it. Images and PDF documents are base64.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Parse an element of results."""
        self.raw: dict[str, Any] = dict(data.get("data") or {})  # by MIME type
        self.is_main = bool(data.get("is_main"))  # whether it is the value of the last expression
        self.text: str | None = self.raw.get("text/plain")
        self.html: str | None = self.raw.get("text/html")
        self.markdown: str | None = self.raw.get("text/markdown")
        self.svg: str | None = self.raw.get("image/svg+xml")
        self.png: str | None = self.raw.get("image/png")
        self.jpeg: str | None = self.raw.get("image/jpeg")
        self.pdf: str | None = self.raw.get("application/pdf")
        self.latex: str | None = self.raw.get("text/latex")
        self.json: Any = self.raw.get("application/json")
        self.javascript: str | None = self.raw.get("application/javascript")
        self.data: dict[str, list[Any]] | None = self.raw.get("application/vnd.dataframe+json")  # of a DataFrame

    def formats(self) -> list[str]:
        """Return the MIME types of the formats that the value has."""
        return list(self.raw)

    def __repr__(self) -> str:
        return f"<Result {', '.join(self.raw)}>"

    def __str__(self) -> str:
        return self.text or repr(self)


class Output:
    """The output of a run or a process."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.lines: list[OutputLine] = list(data.get("output") or ())
        self.truncated = bool(data.get("truncated"))  # whether a part of the output is missing
        self._bytes: dict[str, bytes] | None = None  # what was printed on each stream, if it was transferred as bytes

    @property
    def stdout(self) -> str:
        """The standard output, also of a terminal, without trailing white space."""
        return self._text("stdout", "terminal")

    @property
    def stderr(self) -> str:
        """The standard error, without trailing white space."""
        return self._text("stderr")

    @property
    def text(self) -> str:
        """Both, in the order of lines, without trailing white space. print(result) prints it."""
        return self._text("stdout", "stderr", "terminal")

    @property
    def stdout_bytes(self) -> bytes:
        """The standard output exactly as it was printed if it was transferred as bytes, otherwise stdout in UTF-8."""
        if self._bytes is None:
            return self.stdout.encode("utf-8", "replace")
        return self._bytes.get("stdout", b"") + self._bytes.get("terminal", b"")

    @property
    def stderr_bytes(self) -> bytes:
        """The same of the standard error."""
        return self.stderr.encode("utf-8", "replace") if self._bytes is None else self._bytes.get("stderr", b"")

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
        self.exit_code: int | None = data.get("exit_code")  # 1 after an exception; None if the run has not ended
        self.count: int = data.get("count", 0)  # how many runs the interpreter had begun
        self.state_lost = bool(data.get("state_lost"))  # whether the interpreter ended and lost its variables
        self.results: list[Result] = [Result(result) for result in data.get("results") or ()]
        error = data.get("error")
        self.exception: CodeException | None = None
        if isinstance(error, Mapping):
            self.exception = CodeException(*(str(error.get(key, "")) for key in ("name", "value", "traceback")))

    @property
    def status(self) -> str:
        """success, or error if the code raised an exception."""
        return self._status

    @property
    def language(self) -> str:
        """The language of the code."""
        return self._language

    @property
    def png(self) -> str | None:
        """The last PNG image that the code has shown, in base64."""
        return next((result.png for result in reversed(self.results) if result.png is not None), None)

    def raise_for_status(self: ExecutionT) -> ExecutionT:
        """Return this result if the code succeeded. Otherwise raise CodeError."""
        if self._status != "success":
            raise CodeError.of(self)
        return self

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

    def raise_for_status(self: CommandT) -> CommandT:
        """Return this result if the exit code is 0. Otherwise raise CommandExitError."""
        if not self._success:
            raise CommandExitError.of(self)
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._command!r} exit_code={self._exit_code}>"


class ProcessResult(Output):
    """What a process has printed, as far as the server remembers it, and how it has ended."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        """Parse a result of sandbox.process.logs or sandbox.process.connect."""
        super().__init__(data)
        end = data.get("exit") or {}
        self.running = bool(data.get("running", not end))
        self.exit_code: int | None = end.get("exit_code")  # 128+N if signal N ended it; None if it runs
        self.signal: str | None = end.get("signal") or None  # the name of the signal that ended it, such as KILL
        self.timed_out = bool(end.get("timed_out"))  # whether it reached its time limit
        self.reason: str | None = end.get("reason")  # why the kernel killed it, if memory ran out
        self.skipped_bytes: int = data.get("skipped_bytes", 0)  # how much it had printed before this output

    def raise_for_status(self) -> ProcessResult:
        """Return this result if the exit code is 0. Otherwise raise CommandExitError."""
        if self.exit_code != 0:
            raise CommandExitError.of(self)
        return self

    def __repr__(self) -> str:
        return f"<ProcessResult exit_code={self.exit_code}>"
