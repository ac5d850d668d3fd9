"""Sandboxes for blocking code.

    from microsandbox.sync import PythonSandbox

    with PythonSandbox.create(name="my-sandbox") as sandbox:
        print(sandbox.run("6 * 7").output())

Names, parameters, results and errors are the same as in the package microsandbox. No method needs await.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from . import _config
from ._core import Envs, SandboxCore, info_result, list_call, list_result, metrics_result, run_result
from ._http import SyncHTTP
from ._results import CommandExecutionData, ExecutionData, SandboxInfo, SandboxMetrics
from .errors import MicrosandboxError, SandboxNotFoundError

__all__ = [
    "BaseSandbox",
    "Command",
    "CommandExecution",
    "Execution",
    "Metrics",
    "NodeSandbox",
    "PythonSandbox",
    "list_sandboxes",
]

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

    def run(self, command: str, args: Sequence[str] | None = None, timeout: float | None = None) -> CommandExecution:
        """Run a program without a shell; see microsandbox.Command.run."""
        call = self._sandbox._command_call(command, args, timeout)
        return CommandExecution(run_result(self._sandbox._http.call(call)))


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
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
        timeout: float | None = None,
    ) -> SandboxT:
        """Create a sandbox and start it. The end of a with block, or stop(), stops it."""
        sandbox = cls(server_url=server_url, namespace=namespace, name=name, api_key=api_key)
        sandbox.start(
            image=image,
            memory=memory,
            cpus=cpus,
            volumes=volumes,
            envs=envs,
            workdir=workdir,
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
        volumes: Sequence[str] | None = None,
        envs: Envs | None = None,
        workdir: str | None = None,
    ) -> None:
        """Start the sandbox, and return when it is ready; see microsandbox.BaseSandbox.start."""
        if self._is_started:
            return
        if image is None:
            image = self.get_default_image()
        call = self._start_call(image, memory, cpus, volumes, envs, workdir, timeout)
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

    def run(self, code: str, timeout: float | None = None) -> Execution:
        """Run code. Variables and definitions are kept for the next run; see microsandbox.BaseSandbox.run."""
        return Execution(run_result(self._http.call(self._code_call(code, timeout))))

    @property
    def command(self) -> Command:
        """Runs programs in the sandbox."""
        return Command(self)

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
