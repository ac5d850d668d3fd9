"""The code that the asyncio and the blocking sandboxes share. It builds the calls and checks their results."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Union

from . import _config
from ._results import SandboxInfo, SandboxMetrics
from ._rpc import MAX_SECONDS, Call
from .errors import InvalidParamsError, NotStartedError, SandboxNotFoundError, UnexpectedAnswerError

# Seconds to wait for a response. The server's own limits are shorter.
_START_LIMIT = 180.0
_STOP_LIMIT = 120.0
_QUERY_LIMIT = 30.0
# Seconds that a run may take beyond its time limit: waiting while other runs finish, and the network.
_RUN_GRACE = 120.0

Envs = Union[Mapping[str, str], Sequence[str]]


class SandboxCore:
    """The attributes of a sandbox, and the calls that its methods make."""

    # The class of each language sets these.
    _image: ClassVar[str]
    _language: ClassVar[str]

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
        volumes: Sequence[str] | None,
        envs: Envs | None,
        workdir: str | None,
        timeout: float | None,
    ) -> Call:
        limit = _START_LIMIT if timeout is None else _seconds(timeout)
        config: dict[str, Any] = {"image": _not_empty("image", image)}
        if memory is not None:
            config["memory"] = memory
        if cpus is not None:
            config["cpus"] = round(cpus)
        if volumes:
            config["volumes"] = _strings("volumes", volumes)
        if envs:
            config["envs"] = _assignments(envs)
        if workdir is not None:
            config["workdir"] = workdir
        return Call("sandbox.start", {**self._sandbox_params(), "config": config}, limit or None, idempotent=True)

    def _stop_call(self) -> Call:
        # Not idempotent, because a second stop would not find the sandbox.
        return Call("sandbox.stop", self._sandbox_params(), _STOP_LIMIT)

    def _code_call(self, code: str, timeout: float | None) -> Call:
        self._require_start()
        params = {**self._sandbox_params(), "language": self._language, "code": code}
        return _run("sandbox.repl.run", params, timeout)

    def _command_call(self, command: str, args: Sequence[str] | None, timeout: float | None) -> Call:
        self._require_start()
        params = {**self._sandbox_params(), "command": command, "args": _strings("args", args or ())}
        return _run("sandbox.command.run", params, timeout)

    def _metrics_call(self) -> Call:
        self._require_start()
        return Call("sandbox.metrics.get", self._sandbox_params(), _QUERY_LIMIT, idempotent=True)

    def _info_call(self) -> Call:
        return Call("sandbox.get", self._sandbox_params(), _QUERY_LIMIT, idempotent=True)


def _run(method: str, params: dict[str, Any], timeout: float | None) -> Call:
    """Return the call for a run. Without a timeout, the run may take as long as the server allows."""
    timeout = _seconds(timeout)
    if timeout is None:
        return Call(method, params, None)
    return Call(method, {**params, "timeout": timeout}, min(timeout, MAX_SECONDS) + _RUN_GRACE if timeout else None)


def _seconds(timeout: float | None) -> float | None:
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
    unset = [name for name, value in envs.items() if value is None]
    if unset:
        raise InvalidParamsError(f"envs: {unset[0]} has no value: give a string, or leave the variable out")
    return [f"{name}={value}" for name, value in envs.items()]


def _strings(param: str, values: Sequence[str]) -> list[str]:
    """Return a list of strings. A single string is refused, because it is also a sequence of its characters."""
    if isinstance(values, (str, bytes)):
        raise InvalidParamsError(f"{param} must be a list of strings, not the string {values!r}: put it in [ and ]")
    return list(values)


def _not_empty(param: str, value: str | None) -> str | None:
    """Check that a value that was given is not empty, so that it is not taken for one that was left out."""
    if value == "":
        raise InvalidParamsError(f"{param} is empty: give a {param}, or leave it out")
    return value


def run_result(result: Any) -> dict[str, Any]:
    """Check the result of a run."""
    if not isinstance(result, dict) or not isinstance(result.get("output"), list):
        raise UnexpectedAnswerError(
            "the result of the run has an unexpected format; the server may be newer than this package"
        )
    return result


def list_call(namespace: str | None, after: str) -> Call:
    """Return the call for the sandboxes that follow after, a value from list_result; "" begins the list."""
    params = {}
    if _not_empty("namespace", namespace) is not None:
        params["namespace"] = namespace
    if after:
        params["after"] = after
    return Call("sandbox.list", params, _QUERY_LIMIT, idempotent=True)


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
