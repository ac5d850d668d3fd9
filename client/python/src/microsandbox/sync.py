"""Sandboxes for blocking code.

    from microsandbox.sync import PythonSandbox

    with PythonSandbox.create(name="my-sandbox") as sandbox:
        print(sandbox.run("6 * 7").output())

Names, parameters, results and errors are the same as in the package microsandbox. No method needs await.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Callable, Literal, TypeVar, overload

from . import _config, forward
from ._abilities import (
    ContextsCore,
    FilesCore,
    Path,
    ProcessCore,
    context,
    context_list,
    file_changes,
    file_exists,
    file_info,
    file_list,
    find_call,
    output_bytes,
    output_pieces,
    process_identity,
    process_info,
    process_list,
    process_list_call,
    start_call,
)
from ._core import Envs, SandboxCore, info_result, list_call, list_result, metrics_result, run_options
from ._http import SyncHTTP, SyncStream
from ._results import (
    CommandExecutionData,
    Context,
    ExecutionData,
    FileChange,
    FileInfo,
    Piece,
    ProcessInfo,
    ProcessResult,
    Result,
    SandboxInfo,
    SandboxMetrics,
)
from ._transfers import Progress
from .errors import MicrosandboxError, SandboxNotFoundError

__all__ = [
    "BaseSandbox",
    "Command",
    "CommandExecution",
    "Contexts",
    "Execution",
    "Files",
    "Forward",
    "Metrics",
    "NodeSandbox",
    "Process",
    "Processes",
    "Pty",
    "PythonSandbox",
    "Stream",
    "Terminals",
    "list_sandboxes",
]

Stream = SyncStream

_logger = logging.getLogger("microsandbox")

SandboxT = TypeVar("SandboxT", bound="BaseSandbox")


class Execution(ExecutionData):
    """The status and the output of a run of code."""

    def output(self) -> str:
        """Return stdout."""
        return self.stdout

    def error(self) -> str:
        """Return stderr."""
        return self.stderr


class CommandExecution(CommandExecutionData):
    """The exit code and the output of a command."""

    def output(self) -> str:
        """Return stdout."""
        return self.stdout

    def error(self) -> str:
        """Return stderr."""
        return self.stderr


class Command:
    """Runs programs in a sandbox."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    def run(
        self,
        command: str,
        args: Sequence[str] | None = None,
        timeout: float | None = None,
        *,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        text: bool = True,
        on_stdout: Callable[[Any], Any] | None = None,
        on_stderr: Callable[[Any], Any] | None = None,
    ) -> CommandExecution:
        """Run a program without a shell; see microsandbox.Command.run."""
        options = run_options(cwd, envs, user, stdin)
        run = self._sandbox._command_run(CommandExecution, command, args, timeout, options, text, on_stdout, on_stderr)
        return self._sandbox._http.run(run)


class BaseProcess(ProcessCore):
    """What processes with and without a terminal have in common."""

    _sandbox: BaseSandbox

    def wait(
        self,
        timeout: float | None = None,
        *,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
    ) -> ProcessResult:
        """Wait until the process has ended, and return what it has printed; see microsandbox.Process.wait."""
        return self._sandbox._http.run(self._wait_run(timeout, on_stdout, on_stderr))

    def logs(self) -> ProcessResult:
        """Return the last 1 MiB that the process has printed, or what the server remembers of it. Do not wait."""
        return self._sandbox._http.run(self._logs_run())

    def info(self) -> ProcessInfo:
        """Return what the server knows about the process."""
        return process_info(self._sandbox._http.call(self._info_call()))

    def signal(self, name: str = "TERM", all: bool = False) -> None:  # noqa: A002
        """Send a signal, such as TERM or INT, to the process, or to everything that it has started."""
        self._sandbox._http.call(self._signal_call(name, all))

    def kill(self) -> None:
        """Kill the process and everything that it has started."""
        self._sandbox._http.call(self._signal_call("KILL", True))


class Process(BaseProcess):
    """A process in a sandbox. It goes on when the program that started it ends."""

    def output(self, replay: bool = True) -> SyncStream[Piece]:
        """Return the pieces of the output, for a for loop, until the process ends; see microsandbox.Process.output."""
        return SyncStream(self._sandbox._http, self._output_call(replay), output_pieces())

    def send_stdin(self, data: str | bytes) -> None:
        """Write to the standard input, and return when the process has read it. start() needs open_stdin=True."""
        for call in self._input_calls(data):
            self._sandbox._http.call(call)

    def close_stdin(self) -> None:
        """End the standard input."""
        for call in self._input_calls(b"", close=True):
            self._sandbox._http.call(call)


class Processes:
    """Starts and finds processes."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    def start(
        self,
        command: str,
        args: Sequence[str] | None = None,
        *,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        open_stdin: bool = False,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Process:
        """Start a program without a shell, and return when it has started; see microsandbox.Processes.start."""
        options = run_options(cwd, envs, user, stdin)
        call = start_call(self._sandbox, command, args, timeout, tag, options, open_stdin=open_stdin)
        return Process(self._sandbox, *process_identity(self._sandbox._http.call(call)))

    def connect(self, process: int | str) -> Process:
        """Return the process with this pid, or the newest with this tag. It may have ended."""
        return Process(self._sandbox, *process_identity(self._sandbox._http.call(find_call(self._sandbox, process))))

    def list(self) -> builtins.list[ProcessInfo]:
        """Return the processes that run, and those that ended and that the server remembers."""
        return process_list(self._sandbox._http.call(process_list_call(self._sandbox)))


class Pty(BaseProcess):
    """A process with a terminal. It goes on when the program that started it ends."""

    def output(self, replay: bool = True) -> SyncStream[bytes]:
        """Return what the process writes to the terminal, for a for loop; see microsandbox.Pty.output."""
        return SyncStream(self._sandbox._http, self._output_call(replay), output_bytes())

    def send_input(self, data: str | bytes) -> None:
        r"""Type into the terminal. "\r" is the Enter key, and "\x04" is Ctrl-D, which ends the input."""
        for call in self._input_calls(data):
            self._sandbox._http.call(call)

    def resize(self, cols: int, rows: int) -> None:
        """Change the size of the terminal."""
        self._sandbox._http.call(self._resize_call(cols, rows))


class Terminals:
    """Starts and finds processes with a terminal."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    def start(
        self,
        command: str = "bash",
        args: Sequence[str] | None = None,
        *,
        cols: int = 80,
        rows: int = 24,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        tag: str | None = None,
        timeout: float | None = None,
    ) -> Pty:
        """Start a program in a terminal with this number of columns and rows; see microsandbox.Processes.start."""
        options = run_options(cwd, envs, user)
        call = start_call(self._sandbox, command, args, timeout, tag, options, size=(cols, rows))
        return Pty(self._sandbox, *process_identity(self._sandbox._http.call(call)))

    def connect(self, process: int | str) -> Pty:
        """Return the process with this pid, or the newest with this tag. It may have ended."""
        return Pty(self._sandbox, *process_identity(self._sandbox._http.call(find_call(self._sandbox, process))))


class Files(FilesCore):
    """The files of a sandbox; see microsandbox.Files."""

    _sandbox: BaseSandbox

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    @overload
    def read(self, path: Path, format: Literal["text"] = "text") -> str: ...

    @overload
    def read(self, path: Path, format: Literal["bytes"]) -> bytes: ...

    def read(self, path: Path, format: str = "text") -> str | bytes:  # noqa: A002
        """Return the content of a file, as text in UTF-8 or as bytes. Symbolic links are followed."""
        return self._sandbox._http.receive(*self._read(path, format))

    def write(self, path: Path, data: str | bytes, mode: int | str | None = None, user: str | None = None) -> FileInfo:
        """Write a file in one step, and create missing directories; see microsandbox.Files.write."""
        call, chunks = self._write(path, data, mode, user)
        return file_info(self._sandbox._http.send(call, chunks, None))

    def list(self, path: Path, depth: int = 1) -> builtins.list[FileInfo]:
        """Return the entries of a directory, sorted by name. depth is the number of levels to list."""
        return file_list(self._sandbox._http.call(self._list_call(path, depth)))

    def stat(self, path: Path) -> FileInfo:
        """Describe a file. A symbolic link is described itself, and its target in info["target"]."""
        return file_info(self._sandbox._http.call(self._query("stat", path)))

    def exists(self, path: Path) -> bool:
        """Report whether a file exists. A symbolic link exists even if it leads nowhere."""
        return file_exists(self._sandbox._http.call(self._query("exists", path)))

    def mkdir(self, path: Path, mode: int | str | None = None, user: str | None = None) -> FileInfo:
        """Create a directory and its missing parents. info["created"] is False if it existed."""
        return file_info(self._sandbox._http.call(self._mkdir_call(path, mode, user)))

    def move(self, source: Path, target: Path) -> FileInfo:
        """Rename a file or a directory. A file at the new path is replaced, and missing directories are created."""
        return file_info(self._sandbox._http.call(self._move_call(source, target)))

    def remove(self, path: Path, recursive: bool = False) -> None:
        """Remove a file or an empty directory. recursive: also remove everything in a directory."""
        self._sandbox._http.call(self._remove_call(path, recursive))

    def watch(self, path: Path, recursive: bool = False) -> SyncStream[FileChange]:
        """Report the changes of a file, or of the files in a directory, from this call on.

        with sandbox.files.watch("/tmp") as changes:
            for change in changes:
                print(change.type, change.path)
        """
        return SyncStream(self._sandbox._http, self._watch_call(path, recursive), file_changes, announced=True)

    def upload(self, local: Path, remote: Path, *, on_progress: Progress | None = None) -> None:
        """Copy a file or a directory of this machine to the sandbox; see microsandbox.Files.upload."""
        self._sandbox._callbacks(on_progress=on_progress)
        call, chunks = self._upload(local, remote)
        self._sandbox._http.send(call, chunks, on_progress)

    def download(self, remote: Path, local: Path, *, on_progress: Progress | None = None) -> None:
        """Copy a file or a directory of the sandbox to this machine; see microsandbox.Files.download."""
        self._sandbox._callbacks(on_progress=on_progress)
        call, consume = self._download(self.stat(remote), remote, local)
        self._sandbox._http.receive(call, consume, on_progress)


class Contexts(ContextsCore):
    """Creates and removes contexts, which keep their variables apart. run() has a parameter context."""

    _sandbox: BaseSandbox

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    def create(
        self, language: str | None = None, name: str | None = None, cwd: str | None = None, user: str | None = None
    ) -> Context:
        """Create a context, and return when its interpreter is ready; see microsandbox.Contexts.create."""
        return context(self._sandbox._http.call(self._create_call(language, name, cwd, user)))

    def list(self) -> builtins.list[Context]:
        """Return the contexts, also those of runs that name none."""
        return context_list(self._sandbox._http.call(self._list_call()))

    def restart(self, which: Context | str) -> Context:
        """Replace the interpreter of a context. Its variables are lost, and a run in progress ends."""
        return context(self._sandbox._http.call(self._change_call("restart", which)))

    def remove(self, which: Context | str) -> None:
        """End the interpreter of a context, and forget the context."""
        self._sandbox._http.call(self._change_call("remove", which))


class Forward:
    """A port of this machine that leads to a port of a sandbox, until close() or the end of a with block.

    A thread with an event loop serves the connections.
    """

    def __init__(self, sandbox_instance: BaseSandbox, port: int, local_port: int, host: str) -> None:
        self._forward = forward.Forward(sandbox_instance, port, local_port, host)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="microsandbox-forward", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._forward._open(), self._loop).result()
        except BaseException:
            self._end()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port of this machine."""
        return self._forward.address

    @property
    def local_port(self) -> int:
        """The port of this machine."""
        return self._forward.local_port

    def __repr__(self) -> str:
        return repr(self._forward)

    def close(self) -> None:
        """Close the port and its connections."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._forward.close(), self._loop).result()
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Forward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Metrics:
    """The resource usage of a sandbox. Each method requests it from the server."""

    def __init__(self, sandbox_instance: BaseSandbox) -> None:
        self._sandbox = sandbox_instance

    def all(self) -> SandboxMetrics:
        """Return all metrics as a dict. Raises SandboxNotFoundError if the sandbox does not exist."""
        return metrics_result(self._sandbox._http.call(self._sandbox._metrics_call()))

    def cpu(self) -> float | None:
        """Return the CPU usage, in percent of one processor."""
        return self.all()["cpu_usage"]

    def memory(self) -> int | None:
        """Return the memory usage, in MiB."""
        return self.all()["memory_usage"]

    def disk(self) -> int | None:
        """Return the disk usage, in bytes."""
        return self.all()["disk_usage"]

    def is_running(self) -> bool:
        """Report whether the sandbox is running. False if it does not exist."""
        try:
            return self.all()["running"]
        except SandboxNotFoundError:
            return False


class BaseSandbox(SandboxCore):
    """A sandbox on an msbd server, for blocking code. Use PythonSandbox or NodeSandbox.

    Several threads may use the same object. A KeyboardInterrupt during a call also interrupts its run in the sandbox.
    All errors are subclasses of MicrosandboxError.
    """

    _is_async = False

    def __init__(
        self,
        server_url: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        """Create an object for a sandbox. Nothing is sent. The parameters are those of microsandbox.BaseSandbox."""
        super().__init__(server_url, namespace, name, api_key)
        self._http = SyncHTTP(self._config)

    def get_default_image(self) -> str:
        """Return the name of the image that start() uses if none is given."""
        return self._image

    @classmethod
    def create(
        cls: type[SandboxT],
        server_url: str | None = None,
        namespace: str | None = None,
        name: str | None = None,
        api_key: str | None = None,
        *,
        image: str | None = None,
        memory: int | None = None,
        cpus: float | None = None,
        disk: int | None = None,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
        timeout: float | None = None,
    ) -> SandboxT:
        """Create a sandbox and start it. The end of a with block, or stop(), stops it."""
        sandbox = cls(server_url=server_url, namespace=namespace, name=name, api_key=api_key)
        sandbox.start(
            image=image,
            memory=memory,
            cpus=cpus,
            disk=disk,
            volumes=volumes,
            envs=envs,
            workdir=workdir,
            user=user,
            hostname=hostname,
            timeout=timeout,
        )
        return sandbox

    def start(
        self,
        image: str | None = None,
        memory: int | None = None,
        cpus: float | None = None,
        timeout: float | None = None,
        *,
        disk: int | None = None,
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        user: str | None = None,
        hostname: str | None = None,
    ) -> None:
        """Start the sandbox, and return when it is ready; see microsandbox.BaseSandbox.start."""
        if self._is_started:
            return
        if image is None:
            image = self.get_default_image()
        call = self._start_call(image, memory, cpus, disk, volumes, envs, workdir, user, hostname, timeout)
        try:
            self._http.call(call)
        except BaseException:
            self._http.close()
            raise
        self._is_started = True

    def stop(self) -> None:
        """Stop the sandbox, if this object started it. Its data is deleted, and its name can be used again.

        After an error other than SandboxNotFoundError, the sandbox still counts as started: it can be used, and
        stop can be called again.
        """
        if not self._is_started:
            return
        try:
            self._http.call(self._stop_call())
        except SandboxNotFoundError:
            self._is_started = False
            self._http.close()
            raise
        self._is_started = False
        self._http.close()

    def close(self) -> None:
        """Close the connections to the server as soon as no call is in progress. The sandbox keeps running.

        The next call opens new connections.
        """
        self._http.close()

    def info(self) -> SandboxInfo:
        """Return the sandbox's state and configuration as a dict; see microsandbox.BaseSandbox.info."""
        try:
            return info_result(self._http.call(self._info_call()))
        finally:
            if not self._is_started:
                self._http.close()

    def run(
        self,
        code: str,
        timeout: float | None = None,
        *,
        language: str | None = None,
        context: Context | str | None = None,
        cwd: str | None = None,
        envs: Envs | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        on_stdout: Callable[[str], Any] | None = None,
        on_stderr: Callable[[str], Any] | None = None,
        on_result: Callable[[Result], Any] | None = None,
    ) -> Execution:
        """Run code. Variables and definitions are kept for the next run; see microsandbox.BaseSandbox.run."""
        options = run_options(cwd, envs, user, stdin)
        run = self._code_run(Execution, code, timeout, language, context, options, on_stdout, on_stderr, on_result)
        return self._http.run(run)

    def forward(self, port: int, local_port: int = 0, host: str = "127.0.0.1") -> Forward:
        """Make a TCP port of the sandbox a port of this machine; see microsandbox.BaseSandbox.forward."""
        return Forward(self, port, local_port, host)

    @property
    def command(self) -> Command:
        """Runs programs in the sandbox."""
        return Command(self)

    @property
    def process(self) -> Processes:
        """Starts and finds processes that go on when the call has ended."""
        return Processes(self)

    @property
    def pty(self) -> Terminals:
        """Starts and finds processes with a terminal."""
        return Terminals(self)

    @property
    def files(self) -> Files:
        """Reads, writes, watches, uploads and downloads files."""
        return Files(self)

    @property
    def contexts(self) -> Contexts:
        """Creates and removes contexts of run()."""
        return Contexts(self)

    @property
    def metrics(self) -> Metrics:
        """Returns the resource usage of the sandbox."""
        return Metrics(self)

    def __enter__(self: SandboxT) -> SandboxT:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except SandboxNotFoundError:
            pass  # the sandbox no longer exists, which is the goal
        except MicrosandboxError as failure:
            if error is None:
                raise
            _logger.warning("stop sandbox %s: %s", self._name, failure)
        finally:
            self.close()  # stop closes the connections only if it succeeds


class PythonSandbox(BaseSandbox):
    """A sandbox that runs Python."""

    _image = "microsandbox/python"
    _language = "python"


class NodeSandbox(BaseSandbox):
    """A sandbox that runs JavaScript with Node.js."""

    _image = "microsandbox/node"
    _language = "nodejs"


def list_sandboxes(
    namespace: str | None = None, *, server_url: str | None = None, api_key: str | None = None
) -> list[SandboxInfo]:
    """Return all sandboxes of a namespace; see microsandbox.list_sandboxes."""
    http = SyncHTTP(_config.load(server_url, api_key))
    sandboxes: list[SandboxInfo] = []
    after = ""
    try:
        while True:
            page, after = list_result(http.call(list_call(namespace, after)), after)
            sandboxes += page
            if not after:
                return sandboxes
    finally:
        http.close()
