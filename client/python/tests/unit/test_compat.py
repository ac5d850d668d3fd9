"""Tests that everything that programs for microsandbox 0.1.8 use exists: modules, names, parameters, attributes.

tests/original tests that it behaves the same.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import httpx
import pytest

import microsandbox
from microsandbox import BaseSandbox, CommandExecution, Execution, PythonSandbox

from .stub import RESULTS, TEST_KEY, Server

pytestmark = pytest.mark.anyio

MODULES = {
    "base_sandbox": "BaseSandbox",
    "command": "Command",
    "command_execution": "CommandExecution",
    "execution": "Execution",
    "metrics": "Metrics",
    "node_sandbox": "NodeSandbox",
    "python_sandbox": "PythonSandbox",
}

# The parameters of each method in their order, and whether it is awaited.
METHODS = [
    ("BaseSandbox", "__init__", ["server_url", "namespace", "name", "api_key"], False),
    ("BaseSandbox", "create", ["server_url", "namespace", "name", "api_key"], False),
    ("BaseSandbox", "get_default_image", [], True),
    ("BaseSandbox", "start", ["image", "memory", "cpus", "timeout"], True),
    ("BaseSandbox", "stop", [], True),
    ("BaseSandbox", "run", ["code"], True),
    ("Command", "__init__", ["sandbox_instance"], False),
    ("Command", "run", ["command", "args", "timeout"], True),
    ("Metrics", "__init__", ["sandbox_instance"], False),
    ("Metrics", "all", [], True),
    ("Metrics", "cpu", [], True),
    ("Metrics", "memory", [], True),
    ("Metrics", "disk", [], True),
    ("Metrics", "is_running", [], True),
    ("Execution", "__init__", ["output_data"], False),
    ("Execution", "output", [], True),
    ("Execution", "error", [], True),
    ("Execution", "has_error", [], False),
    ("CommandExecution", "__init__", ["output_data"], False),
    ("CommandExecution", "output", [], True),
    ("CommandExecution", "error", [], True),
]


@pytest.mark.parametrize("module", MODULES)
def test_modules(module: str) -> None:
    found = getattr(importlib.import_module(f"microsandbox.{module}"), MODULES[module])
    assert found is getattr(microsandbox, MODULES[module])
    assert MODULES[module] in microsandbox.__all__


@pytest.mark.parametrize(("owner", "name", "parameters", "awaited"), METHODS)
def test_methods(owner: str, name: str, parameters: list[str], awaited: bool) -> None:
    method = getattr(getattr(microsandbox, owner), name)
    positional = [
        p.name
        for p in inspect.signature(method).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "cls")
    ]
    assert positional[: len(parameters)] == parameters
    assert inspect.iscoroutinefunction(method) == awaited


async def test_results_created_by_programs() -> None:
    """Tests of programs create results themselves."""
    nothing: Any = None
    for execution in (Execution(), Execution(nothing), Execution({}), Execution(output_data={"output": None})):
        assert (execution.status, execution.language, execution.has_error()) == ("unknown", "unknown", False)
        assert await execution.output() == await execution.error() == ""
    assert Execution({"status": "exception"}).has_error()
    assert Execution({"output": [{"stream": "stderr", "text": "warning"}]}).has_error()
    assert not Execution({"output": [{"stream": "stderr", "text": ""}]}).has_error()
    for command in (CommandExecution(), CommandExecution({}), CommandExecution({"args": None})):
        assert (command.command, command.args, command.exit_code, command.success) == ("", [], -1, False)
    command = CommandExecution(output_data=RESULTS["sandbox.command.run"])
    assert (await command.output(), await command.error(), command.exit_code) == ("hello", "no", 3)


@pytest.mark.usefixtures("server")
async def test_session_set_by_the_program() -> None:
    """With version 0.1, programs that do not use create() set an HTTP session and close it."""

    class Session:
        closed = False

        async def close(self) -> None:
            self.closed = True

    sandbox = PythonSandbox(name="my-env")
    session = sandbox._session = Session()
    await sandbox.start(memory=1024, cpus=2.0)
    assert sandbox._is_started
    await sandbox.stop()
    await sandbox._session.close()
    assert session.closed


async def test_subclass_that_sends_requests(server: Server) -> None:
    """A subclass for version 0.1 uses the attributes of the base class and a session."""

    class Subclass(BaseSandbox):
        async def get_default_image(self) -> str:
            return "acme/python"

        async def start(  # type: ignore[override]
            self, image: Any = None, memory: int = 512, cpus: float = 1.0, timeout: float = 180.0
        ) -> None:
            self._session = httpx.AsyncClient(trust_env=False)
            await super().start(image, memory, cpus, timeout)

        async def run(self, code: str) -> Execution:  # type: ignore[override]
            params = {"sandbox": self._name, "namespace": self._namespace, "language": "python", "code": code}
            response = await self._session.post(
                f"{self._server_url}/api/v1/rpc",
                json={"jsonrpc": "2.0", "method": "sandbox.repl.run", "params": params, "id": 1},
                headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._api_key}"},
            )
            return Execution(output_data=response.json()["result"])

    async with Subclass.create(name="my-env", namespace="team") as sandbox:
        assert await (await sandbox.run("6 * 7")).output() == "42"
        await sandbox._session.aclose()
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.repl.run", "sandbox.stop"]
    assert server.requests[0].params["config"] == {"image": "acme/python", "memory": 512, "cpus": 1}
    assert server.requests[1].headers["authorization"] == f"Bearer {TEST_KEY}"


async def test_subclass_with_another_image(server: Server) -> None:
    class Subclass(PythonSandbox):
        async def get_default_image(self) -> str:
            return "acme/python"

    async with Subclass.create() as sandbox:
        assert isinstance(sandbox, Subclass)
    assert server.requests[0].params["config"] == {"image": "acme/python"}
    assert await microsandbox.NodeSandbox().get_default_image() == "microsandbox/node"
