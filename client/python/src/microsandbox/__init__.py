"""Run untrusted code in microVMs, on an msbd server.

    from microsandbox import PythonSandbox

    async with PythonSandbox.create(name="my-sandbox") as sandbox:
        result = await sandbox.run("6 * 7")
        print(await result.output())

microsandbox.sync has the same classes for blocking code.
"""

from ._results import OutputLine, SandboxInfo, SandboxMetrics
from .base_sandbox import BaseSandbox
from .command import Command
from .command_execution import CommandExecution
from .errors import (
    AuthenticationError,
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
from .metrics import Metrics
from .node_sandbox import NodeSandbox
from .python_sandbox import PythonSandbox
from .sandboxes import list_sandboxes

__version__ = "0.3.0"

__all__ = [
    "AuthenticationError",
    "BaseSandbox",
    "Command",
    "CommandExecution",
    "CommandNotExecutableError",
    "CommandNotFoundError",
    "ConfigError",
    "ConflictError",
    "ConnectionLostError",
    "Execution",
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
    "PythonSandbox",
    "RequestTimeoutError",
    "ResourceExhaustedError",
    "RunFailedError",
    "RunTimeoutError",
    "SandboxInfo",
    "SandboxMetrics",
    "SandboxNotFoundError",
    "ServerUnreachableError",
    "UnavailableError",
    "UnexpectedAnswerError",
    "list_sandboxes",
]
