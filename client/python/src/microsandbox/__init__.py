"""Run untrusted code in microVMs, on an msbd server.

    from microsandbox import PythonSandbox

    async with PythonSandbox.create(name="my-sandbox") as sandbox:
        result = await sandbox.run("6 * 7")
        print(await result.output())

microsandbox.sync has the same classes for blocking code.
"""

from ._http import AsyncStream as Stream
from ._results import (
    CodeException,
    Context,
    FileChange,
    FileInfo,
    OutputLine,
    Piece,
    ProcessExit,
    ProcessInfo,
    ProcessResult,
    Result,
    SandboxInfo,
    SandboxMetrics,
)
from .base_sandbox import BaseSandbox
from .command import Command
from .command_execution import CommandExecution
from .contexts import Contexts
from .errors import (
    AuthenticationError,
    CodeError,
    CommandExitError,
    CommandNotExecutableError,
    CommandNotFoundError,
    ConfigError,
    ConflictError,
    ConnectionLostError,
    InternalError,
    InvalidParamsError,
    InvalidRequestError,
    MethodNotFoundError,
    MicrosandboxError,
    NotStartedError,
    ParseError,
    PermissionDeniedError,
    RequestTimeoutError,
    ResourceExhaustedError,
    RunFailedError,
    RunTimeoutError,
    SandboxNotFoundError,
    ServerUnreachableError,
    UnavailableError,
    UnexpectedAnswerError,
)
from .execution import Execution
from .files import Files
from .forward import Forward
from .metrics import Metrics
from .node_sandbox import NodeSandbox
from .process import Process, Processes
from .pty import Pty, Terminals
from .python_sandbox import PythonSandbox
from .sandboxes import list_sandboxes

__version__ = "0.3.0"

__all__ = [
    "AuthenticationError",
    "BaseSandbox",
    "CodeError",
    "CodeException",
    "Command",
    "CommandExecution",
    "CommandExitError",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "ConfigError",
    "ConflictError",
    "ConnectionLostError",
    "Context",
    "Contexts",
    "Execution",
    "FileChange",
    "FileInfo",
    "Files",
    "Forward",
    "InternalError",
    "InvalidParamsError",
    "InvalidRequestError",
    "MethodNotFoundError",
    "Metrics",
    "MicrosandboxError",
    "NodeSandbox",
    "NotStartedError",
    "OutputLine",
    "ParseError",
    "PermissionDeniedError",
    "Piece",
    "Process",
    "ProcessExit",
    "ProcessInfo",
    "ProcessResult",
    "Processes",
    "Pty",
    "PythonSandbox",
    "RequestTimeoutError",
    "ResourceExhaustedError",
    "Result",
    "RunFailedError",
    "RunTimeoutError",
    "SandboxInfo",
    "SandboxMetrics",
    "SandboxNotFoundError",
    "ServerUnreachableError",
    "Stream",
    "Terminals",
    "UnavailableError",
    "UnexpectedAnswerError",
    "list_sandboxes",
]
