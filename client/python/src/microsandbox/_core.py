"""The code that the asyncio and the blocking sandboxes share. It builds the calls and checks their results."""

from __future__ import annotations

import base64
import inspect
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, ClassVar, NoReturn, TypeVar, Union
from urllib.parse import quote

from . import _config
from ._results import Context, Output, SandboxInfo, SandboxMetrics
from ._rpc import MAX_SECONDS, Call
from ._runs import Callback, Callbacks, Run
from .errors import InvalidParamsError, NotStartedError, SandboxNotFoundError, UnexpectedAnswerError

OutputT = TypeVar("OutputT", bound=Output)
ResultT = TypeVar("ResultT")

# Seconds to wait for a response. The server's own limits are shorter.
_START_LIMIT = 180.0
_STOP_LIMIT = 120.0
QUERY_LIMIT = 30.0
# For a call that changes something in a sandbox: the start of a process or an interpreter, or a change of files.
CHANGE_LIMIT = 300.0
# Seconds that a run may take beyond its time limit: waiting while other runs finish, and the network.
_RUN_GRACE = 120.0

Envs = Union[Mapping[str, str], Sequence[str]]


class SandboxCore:
    """The attributes of a sandbox, and the calls that its methods make."""

    # The class of each language sets these.
    _image: ClassVar[str]
    _language: ClassVar[str]
    # Whether callbacks may be coroutine functions.
    _is_async: ClassVar[bool]

    def __init__(self, server_url: str | None, namespace: str | None, name: str | None, api_key: str | None) -> None:
        self._config = _config.load(server_url, api_key)
        self._namespace = _not_empty("namespace", namespace)
        self._name = _not_empty("name", name) or f"sandbox-{uuid.uuid4().hex[:8]}"
        self._is_started = False

    @property
    def name(self) -> str:
        """The sandbox's name; generated if none was given."""
        return self._name

    @property
    def namespace(self) -> str | None:
        """The given namespace. None means the key's namespace, or default for a key that is not limited to one."""
        return self._namespace

    @property
    def server_url(self) -> str:
        """The URL of the server on which the sandbox runs."""
        return self._config.server_url

    # For subclasses that were written for version 0.1 and send their own requests.

    @property
    def _server_url(self) -> str:
        return self._config.server_url

    @property
    def _api_key(self) -> str | None:
        key = self._config.key
        return None if key is None else key.reveal()

    def __repr__(self) -> str:
        state = "started" if self._is_started else "not started"
        return f"<{type(self).__name__} {self._name!r} at {self.server_url}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a sandbox object cannot be pickled: create a new one with the same name where you need it")

    def _sandbox_params(self) -> dict[str, Any]:
        params = {"sandbox": self._name}
        if self._namespace is not None:
            params["namespace"] = self._namespace
        return params

    def _require_start(self) -> None:
        if not self._is_started:
            raise NotStartedError("Sandbox is not started. Call start() first.")

    def _start_call(
        self,
        image: str,
        memory: int | None,
        cpus: float | None,
        disk: int | None,
        volumes: Sequence[str] | None,
        envs: Envs | None,
        workdir: str | None,
        user: str | None,
        hostname: str | None,
        timeout: float | None,
    ) -> Call:
        limit = _START_LIMIT if timeout is None else seconds(timeout)
        config: dict[str, Any] = {"image": _not_empty("image", image)}
        if memory is not None:
            config["memory"] = memory
        if cpus is not None:
            config["cpus"] = round(cpus)
        if disk is not None:
            config["disk"] = disk
        if volumes:
            config["volumes"] = _strings("volumes", volumes)
        if envs:
            config["envs"] = _assignments(envs)
        if workdir is not None:
            config["workdir"] = workdir
        if user is not None:
            config["user"] = user
        if hostname is not None:
            config["hostname"] = hostname
        return Call("sandbox.start", {**self._sandbox_params(), "config": config}, limit or None, idempotent=True)

    def _stop_call(self) -> Call:
        # Not idempotent, because a second stop would not find the sandbox.
        return Call("sandbox.stop", self._sandbox_params(), _STOP_LIMIT)

    def _call(self, method: str, params: dict[str, Any], limit: float | None, **options: Any) -> Call:
        """Return a call for the sandbox, which must be started. Params that are None are left out."""
        self._require_start()
        given = {name: value for name, value in params.items() if value is not None}
        return Call(method, {**self._sandbox_params(), **given}, limit, **options)

    def _code_run(
        self,
        kind: Callable[[dict[str, Any]], OutputT],
        code: str,
        timeout: float | None,
        language: str | None,
        context: Context | str | None,
        options: dict[str, Any],
        on_stdout: Callback | None,
        on_stderr: Callback | None,
        on_result: Callback | None,
    ) -> Run[OutputT]:
        params = {
            "language": optional("language", language, str),
            "code": checked("code", code, str),
            "context": None if context is None else context_name(context),
            "results": True,
            **options,
        }
        if language is None and context is None:
            params["language"] = self._language
        callbacks = self._callbacks(on_stdout=on_stdout, on_stderr=on_stderr, on_result=on_result)
        return Run(self._run_call("sandbox.repl.run", params, timeout, callbacks), kind, callbacks)

    def _command_run(
        self,
        kind: Callable[[dict[str, Any]], OutputT],
        command: str,
        args: Sequence[str] | None,
        timeout: float | None,
        options: dict[str, Any],
        text: bool,
        on_stdout: Callback | None,
        on_stderr: Callback | None,
    ) -> Run[OutputT]:
        params = {**program(command, args), **options}
        if not checked("text", text, bool) and "encoding" not in params:
            params.update(encoded("stdin", params.get("stdin"), "base64"))
        callbacks = self._callbacks(on_stdout=on_stdout, on_stderr=on_stderr)
        return Run(self._run_call("sandbox.command.run", params, timeout, callbacks), kind, callbacks, text=text)

    def _port_path(self, port: int) -> str:
        """Return the path of the WebSocket that is connected to a port."""
        query = "" if self._namespace is None else f"?namespace={quote(self._namespace, safe='')}"
        return f"/api/v1/sandboxes/{quote(self._name, safe='')}/ports/{port}{query}"

    def _run_call(self, method: str, params: dict[str, Any], timeout: float | None, callbacks: Callbacks) -> Call:
        """Return the call for a run. Without a timeout, the run may take as long as the server allows."""
        timeout = seconds(timeout)
        limit = min(timeout, MAX_SECONDS) + _RUN_GRACE if timeout else None
        return self._call(method, {**params, "timeout": timeout}, limit, stream=any(callbacks.values()))

    def _callbacks(self, **callbacks: Callback | None) -> Callbacks:
        """Check callbacks. Blocking code cannot await one."""
        for name, callback in callbacks.items():
            if callback is not None and not callable(callback):
                raise InvalidParamsError(f"{name} must be a function, not {described(callback)}")
            if not self._is_async and inspect.iscoroutinefunction(callback):
                raise InvalidParamsError(f"{name} must not be a coroutine function: use microsandbox, which awaits it")
        return callbacks

    def _metrics_call(self) -> Call:
        self._require_start()
        return Call("sandbox.metrics.get", self._sandbox_params(), QUERY_LIMIT, idempotent=True)

    def _info_call(self) -> Call:
        return Call("sandbox.get", self._sandbox_params(), QUERY_LIMIT, idempotent=True)


def seconds(timeout: float | None) -> float | None:
    """Check a time limit. Infinity becomes None, because JSON has no infinity."""
    if timeout is None:
        return None
    # Refuse True and False, which are instances of int.
    if type(timeout) is bool or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise InvalidParamsError(f"timeout {timeout!r}: give a number of seconds, 0 or more, or leave it out")
    return None if timeout == math.inf else timeout


def _assignments(envs: Envs) -> list[str]:
    if not isinstance(envs, Mapping):
        return _strings("envs", envs)
    for name, value in envs.items():
        if value is None:
            raise InvalidParamsError(f"envs: {name} has no value: give a string, or leave the variable out")
        checked(f"envs[{name!r}]", value, str)
    return [f"{name}={value}" for name, value in envs.items()]


def _strings(param: str, values: Sequence[str]) -> list[str]:
    """Return a list of strings. A single string is refused, because it is also a sequence of its characters."""
    if isinstance(values, (str, bytes)):
        raise InvalidParamsError(f"{param} must be a list of strings, not the string {values!r}: put it in [ and ]")
    if not isinstance(values, Iterable):
        raise InvalidParamsError(f"{param} must be a list of strings, not {described(values)}")
    return [checked(f"{param}[{number}]", value, str) for number, value in enumerate(values)]


_TYPES = {str: "a string", bool: "True or False", int: "an integer"}


def described(value: Any) -> str:
    """Describe a value of the wrong type. Bytes and strings may be long or secret, so they are not shown."""
    return f"{value!r:.80}" if isinstance(value, (int, float)) else f"a value of the type {type(value).__name__}"


def checked(param: str, value: Any, kind: type[ResultT]) -> ResultT:
    """Check the type of a value. True and False are no integers here."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise InvalidParamsError(f"{param} must be {_TYPES[kind]}, not {described(value)}")
    return value


def optional(param: str, value: Any, kind: type[ResultT]) -> ResultT | None:
    return None if value is None else checked(param, value, kind)


def program(command: str, args: Sequence[str] | None) -> dict[str, Any]:
    return {"command": checked("command", command, str), "args": _strings("args", args or ())}


def encoded(param: str, data: str | bytes | None, encoding: str | None = None) -> dict[str, Any]:
    """Return the params that send text, or bytes in base64."""
    if encoding is None and (data is None or isinstance(data, str)):
        return {} if data is None else {param: data}
    params = {} if data is None else {param: base64.b64encode(as_bytes(param, data)).decode()}
    return {**params, "encoding": "base64"}


def as_bytes(param: str, data: str | bytes) -> bytes:
    """Return bytes, or text in UTF-8."""
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise InvalidParamsError(f"{param} must be a string or bytes, not {described(data)}")
    return data.encode("utf-8", "surrogatepass") if isinstance(data, str) else bytes(data)


def run_options(
    cwd: str | None = None, envs: Envs | None = None, user: str | None = None, stdin: str | bytes | None = None
) -> dict[str, Any]:
    """Return the params that runs and processes have in common."""
    return {
        "cwd": optional("cwd", cwd, str),
        "envs": _assignments(envs) if envs else None,
        "user": optional("user", user, str),
        **encoded("stdin", stdin),
    }


def _not_empty(param: str, value: str | None) -> str | None:
    """Check that a value that was given is not empty, so that it is not taken for one that was left out."""
    if value == "":
        raise InvalidParamsError(f"{param} is empty: give a {param}, or leave it out")
    return value


def context_name(context: Context | str) -> str:
    """Return the name of a context."""
    return context.name if isinstance(context, Context) else checked("context", context, str)


def list_call(namespace: str | None, after: str) -> Call:
    """Return the call for the sandboxes that follow after, a value from list_result; "" begins the list."""
    params = {}
    if _not_empty("namespace", namespace) is not None:
        params["namespace"] = namespace
    if after:
        params["after"] = after
    return Call("sandbox.list", params, QUERY_LIMIT, idempotent=True)


def list_result(result: Any, after: str) -> tuple[list[SandboxInfo], str]:
    """Check the result of list_call. Return its sandboxes, and the after of the next call, "" if none follow."""
    sandboxes = result.get("sandboxes") if isinstance(result, dict) else None
    if not isinstance(sandboxes, list):
        raise UnexpectedAnswerError("the list has an unexpected format; the server may be newer than this package")
    following = result.get("next") or ""
    return sandboxes, following if following > after else ""


def info_result(result: Any) -> SandboxInfo:
    """Check the result of a call for a sandbox."""
    if not isinstance(result, dict) or not isinstance(result.get("state"), str):
        raise UnexpectedAnswerError(
            "the description of the sandbox has an unexpected format; the server may be newer than this package"
        )
    info: SandboxInfo = result  # type: ignore[assignment]
    return info


def metrics_result(result: Any) -> SandboxMetrics:
    """Check the result of a metrics call, and return the metrics of the one sandbox in it."""
    sandboxes = result.get("sandboxes") if isinstance(result, dict) else None
    if not isinstance(sandboxes, list):
        raise UnexpectedAnswerError("the metrics have an unexpected format; the server may be newer than this package")
    if not sandboxes:
        raise SandboxNotFoundError("the sandbox does not exist")
    metrics: SandboxMetrics = sandboxes[0]
    return metrics
