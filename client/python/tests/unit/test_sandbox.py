"""Tests what each method sends and how it handles the response, with asyncio and blocking."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import microsandbox
from microsandbox import (
    ConfigError,
    ConflictError,
    InternalError,
    InvalidParamsError,
    MicrosandboxError,
    NodeSandbox,
    NotStartedError,
    PythonSandbox,
    SandboxNotFoundError,
    UnexpectedAnswerError,
    _http,
)

from ..flavours import begin, done, entered
from .stub import INFO, LONG, TEST_KEY, Server, error_reply, ok

pytestmark = pytest.mark.anyio

RESULTS_WANTED = {"results": True}


async def test_all_methods(api: Any, server: Server) -> None:
    async with entered(api.PythonSandbox.create(name="my-env")) as sandbox:
        execution = await done(sandbox.run("x = 6 * 7\nx"))
        assert await done(execution.output()) == execution.stdout == "42"
        assert await done(execution.error()) == execution.stderr == ""
        assert (execution.status, execution.language, execution.has_error()) == ("success", "python", False)
        assert execution.lines == [{"stream": "stdout", "text": "42"}]

        command = await done(sandbox.command.run("sh", ["-c", "echo hello; echo no >&2; exit 3"], timeout=5))
        assert await done(command.output()) == command.stdout == "hello"
        assert await done(command.error()) == command.stderr == "no"
        assert (command.command, command.args) == ("sh", ["-c", "echo hello; echo no >&2; exit 3"])
        assert (command.exit_code, command.success) == (3, False)
        assert command.text == str(command) == "hello\nno"

        metrics = await done(sandbox.metrics.all())
        assert metrics["name"] == "my-env"
        assert await done(sandbox.metrics.cpu()) == metrics["cpu_usage"] == 12.5
        assert await done(sandbox.metrics.memory()) == metrics["memory_usage"] == 256
        assert await done(sandbox.metrics.disk()) == metrics["disk_usage"] == 1099511627776
        assert await done(sandbox.metrics.is_running()) is True
    which = {"sandbox": "my-env"}
    assert server.sent() == [
        ("sandbox.start", {**which, "config": {"image": "microsandbox/python"}}),
        ("sandbox.repl.run", {**which, "language": "python", "code": "x = 6 * 7\nx", **RESULTS_WANTED}),
        (
            "sandbox.command.run",
            {**which, "command": "sh", "args": ["-c", "echo hello; echo no >&2; exit 3"], "timeout": 5},
        ),
        *[("sandbox.metrics.get", which)] * 5,
        ("sandbox.stop", which),
    ]
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TEST_KEY}"}
    assert server.requests[0].headers["user-agent"] == f"microsandbox-python/{microsandbox.__version__}"


async def test_info_of_a_sandbox_that_another_program_started(api: Any, server: Server) -> None:
    sandbox = api.PythonSandbox(name="my-env", namespace="team-alpha")
    assert await done(sandbox.info()) == INFO
    assert not sandbox._http._client  # nothing is left to close
    await done(sandbox.start())
    assert (await done(sandbox.info()))["state"] == "failed"
    assert sandbox._http._client
    server.answer("sandbox.get", error_reply(404, -32003))
    with pytest.raises(SandboxNotFoundError):
        await done(sandbox.info())
    await done(sandbox.stop())
    which = {"sandbox": "my-env", "namespace": "team-alpha"}
    assert [params for method, params in server.sent() if method == "sandbox.get"] == [which] * 3


async def test_list(api: Any, server: Server) -> None:
    assert await done(api.list_sandboxes()) == [INFO]
    a, b, c = ({**INFO, "name": name} for name in "abc")
    pages = [{"sandboxes": [a, b], "next": "default/b"}, {"sandboxes": [c], "next": "default/c"}]
    server.answer("sandbox.list", *(ok(page) for page in pages))  # the last page repeats, as no real server does
    assert await done(api.list_sandboxes("*", server_url=server.url, api_key=TEST_KEY)) == [a, b, c, c]
    assert server.sent() == [
        ("sandbox.list", {}),
        ("sandbox.list", {"namespace": "*"}),
        ("sandbox.list", {"namespace": "*", "after": "default/b"}),
        ("sandbox.list", {"namespace": "*", "after": "default/c"}),
    ]
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TEST_KEY}"}
    server.answer("sandbox.list", error_reply(500, -32603))
    with pytest.raises(InternalError):
        await done(api.list_sandboxes())
    results: list[Any] = [None, [], {}, {"sandboxes": "a"}]
    for result in results:
        server.answer("sandbox.list", ok(result))
        server.answer("sandbox.get", ok(result))
        for call in (api.list_sandboxes, api.PythonSandbox(name="a").info):
            with pytest.raises(UnexpectedAnswerError, match="an unexpected format"):
                await done(call())


async def test_a_string_is_not_a_list(api: Any, server: Server) -> None:
    """A string is also a sequence, of its characters. It must not be sent as such."""
    sandbox = await done(api.PythonSandbox.create(name="my-env"))
    other = api.PythonSandbox(name="other")
    calls: dict[str, Any] = {
        "args": lambda: sandbox.command.run("echo", "hello"),
        "envs": lambda: other.start(envs="A=1"),
        "volumes": lambda: other.start(volumes="a:/b"),
    }
    for param, call in calls.items():
        with pytest.raises(InvalidParamsError, match=f"^{param} must be a list of strings, not the string "):
            await done(call())
    with pytest.raises(InvalidParamsError, match="envs: A has no value"):
        await done(other.start(envs={"A": None}))
    await done(sandbox.command.run("echo", ("hello",)))
    await done(sandbox.stop())
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.command.run", "sandbox.stop"]


async def test_an_empty_value_is_not_a_missing_one(api: Any, server: Server) -> None:
    for param in ("name", "namespace"):
        with pytest.raises(InvalidParamsError, match=f"^{param} is empty"):
            api.PythonSandbox(**{param: ""})
    with pytest.raises(InvalidParamsError, match="namespace is empty"):
        await done(api.list_sandboxes(""))
    with pytest.raises(InvalidParamsError, match="image is empty"):
        await done(api.PythonSandbox.create(image=""))
    for param in ("api_key", "server_url"):
        for value in ("", " \n"):
            for create in (api.PythonSandbox, api.PythonSandbox.create, api.list_sandboxes):
                with pytest.raises(ConfigError, match=f"^{param} is empty"):
                    await done(create(**{param: value}))
    assert server.sent() == []


async def test_start_options(api: Any, server: Server) -> None:
    options: dict[str, Any] = {
        "image": "acme/tool:2",
        "memory": 1024,
        "cpus": 1.6,
        "volumes": ["data:/data"],
        "envs": {"A": "1", "B": "x=y"},
        "workdir": "/work",
        "disk": 4096,
        "user": "app:staff",
        "hostname": "web",
    }
    config = {**options, "cpus": 2, "envs": ["A=1", "B=x=y"]}
    params = {"sandbox": "my-env", "namespace": "team-alpha", "config": config}
    which = {"name": "my-env", "namespace": "team-alpha", "server_url": server.url + "/", "api_key": TEST_KEY}
    await done((await done(api.NodeSandbox.create(**which, **options, timeout=5))).stop())
    sandbox = api.NodeSandbox(**which)
    await done(sandbox.start(**{**options, "envs": ["A=1", "B=x=y"]}))
    await done(sandbox.run("1"))
    await done(sandbox.stop())
    await done(sandbox.start("acme/tool:2", 512, 0.2, 5))
    await done(sandbox.stop())
    assert server.sent() == [
        ("sandbox.start", params),
        ("sandbox.stop", {"sandbox": "my-env", "namespace": "team-alpha"}),
        ("sandbox.start", params),
        (
            "sandbox.repl.run",
            {"sandbox": "my-env", "namespace": "team-alpha", "language": "nodejs", "code": "1", **RESULTS_WANTED},
        ),
        ("sandbox.stop", {"sandbox": "my-env", "namespace": "team-alpha"}),
        (
            "sandbox.start",
            {
                "sandbox": "my-env",
                "namespace": "team-alpha",
                "config": {"image": "acme/tool:2", "memory": 512, "cpus": 0},
            },
        ),
        ("sandbox.stop", {"sandbox": "my-env", "namespace": "team-alpha"}),
    ]


async def test_start_and_stop_are_sent_once(api: Any, server: Server) -> None:
    sandbox = api.PythonSandbox(name="my-env")
    await done(sandbox.stop())
    async with entered(sandbox) as same:
        assert same is sandbox
        await done(sandbox.start())
        await done(sandbox.stop())
        await done(sandbox.stop())
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.stop"]


async def test_close_does_not_stop_the_sandbox(api: Any, server: Server) -> None:
    sandbox = await done(api.PythonSandbox.create(name="my-env"))
    await done(sandbox.close())
    await done(sandbox.close())
    assert (await done(sandbox.run("6 * 7"))).stdout == "42"
    await done(sandbox.close())
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.repl.run"]


async def test_not_started(api: Any, server: Server) -> None:
    sandbox = api.PythonSandbox(name="my-env")
    calls: list[Any] = [
        lambda: sandbox.run("1"),
        lambda: sandbox.command.run("true"),
        sandbox.metrics.all,
        sandbox.metrics.is_running,
    ]
    for call in calls:
        with pytest.raises(NotStartedError, match=r"not started. Call start\(\) first"):
            await done(call())
    assert server.sent() == []


async def test_generated_names(api: Any) -> None:
    first, second = api.PythonSandbox(), api.PythonSandbox()
    assert first.name != second.name
    assert first.name.startswith("sandbox-")
    assert first.namespace is None
    assert first.server_url == "http://127.0.0.1:5555"
    assert repr(first) == f"<PythonSandbox '{first.name}' at http://127.0.0.1:5555, not started>"


async def test_code_that_raises_an_exception(api: Any, server: Server) -> None:
    lines = [
        {"stream": "stdout", "text": "a"},
        {"stream": "stderr", "text": "Trace"},
        {"stream": "stderr", "text": "E "},
    ]
    server.answer("sandbox.repl.run", ok({"status": "error", "language": "python", "output": lines}))
    async with entered(api.PythonSandbox.create()) as sandbox:
        execution = await done(sandbox.run("raise E"))
        assert execution.has_error()
        assert (execution.status, execution.stdout, execution.stderr) == ("error", "a", "Trace\nE")
        assert execution.text == str(execution) == "a\nTrace\nE"
        assert execution.lines == lines
        assert repr(execution) == "<Execution python error>"


async def test_any_text_is_sent_unchanged(api: Any, server: Server) -> None:
    code = 'print("é 😀 \\ \u2028 \x00")'
    async with entered(api.PythonSandbox.create()) as sandbox:
        await done(sandbox.run(code))
        await done(sandbox.run("\ud800"))
    assert [params["code"] for method, params in server.sent() if method == "sandbox.repl.run"] == [code, "\ud800"]


async def test_results_in_an_unknown_format(api: Any, server: Server) -> None:
    async with entered(api.PythonSandbox.create()) as sandbox:
        results: list[Any] = [None, "done", {}, {"output": None}, []]
        for result in results:
            server.answer("sandbox.repl.run", ok(result))
            server.answer("sandbox.command.run", ok(result))
            server.answer("sandbox.metrics.get", ok(result))
            calls: list[Any] = [lambda: sandbox.run("1"), lambda: sandbox.command.run("true"), sandbox.metrics.all]
            for call in calls:
                with pytest.raises(UnexpectedAnswerError, match="an unexpected format"):
                    await done(call())


async def test_metrics_of_a_missing_sandbox(api: Any, server: Server) -> None:
    async with entered(api.PythonSandbox.create()) as sandbox:
        for reply in (ok({"sandboxes": []}), error_reply(404, -32003)):
            server.answer("sandbox.metrics.get", reply)
            assert await done(sandbox.metrics.is_running()) is False
            with pytest.raises(SandboxNotFoundError):
                await done(sandbox.metrics.cpu())


async def test_start_fails(api: Any, server: Server) -> None:
    server.answer("sandbox.start", error_reply(409, -32005))
    with pytest.raises(ConflictError, match="it is so"):
        async with entered(api.PythonSandbox()):
            raise AssertionError("the block was entered")
    with pytest.raises(ConflictError):
        await done(api.PythonSandbox.create())
    assert {method for method, _ in server.sent()} == {"sandbox.start"}


async def test_stop_of_a_missing_sandbox(api: Any, server: Server) -> None:
    server.answer("sandbox.stop", error_reply(404, -32003))
    async with entered(api.PythonSandbox.create()):
        pass
    sandbox = await done(api.PythonSandbox.create())
    with pytest.raises(SandboxNotFoundError):
        await done(sandbox.stop())
    await done(sandbox.stop())


async def test_failed_stop(api: Any, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answer("sandbox.stop", error_reply(500, -32603))
    with pytest.raises(InternalError):
        async with entered(api.PythonSandbox.create()):
            pass
    # The failed stop does not hide the error that ended the block.
    with pytest.raises(ZeroDivisionError):
        async with entered(api.PythonSandbox.create(name="my-env")):
            raise ZeroDivisionError
    assert caplog.messages == ["stop sandbox my-env: it is so (request id REQUEST-ID)"]


@pytest.mark.parametrize("failure", [error_reply(429, -32006, Retry_After="3600"), error_reply(503, -32009), "drop"])
async def test_failed_stop_does_not_disturb_other_calls(api: Any, server: Server, failure: Any) -> None:
    server.answer("sandbox.repl.run", server.wait)
    server.answer("sandbox.stop", server.drop if failure == "drop" else failure, ok("stopped"))
    sandbox = await done(api.PythonSandbox.create())
    run = begin(sandbox.run, "1")
    assert await asyncio.to_thread(server.began.wait, LONG)
    with pytest.raises(MicrosandboxError):
        await done(sandbox.stop())
    assert sandbox._http._client is not None
    server.go.set()
    assert (await run).stdout == "42"
    assert sandbox._http._client is not None
    await done(sandbox.stop())
    assert sandbox._http._client is None


@pytest.mark.parametrize("end", ["stop", "close", "block"])
async def test_connections_are_closed_after_the_last_call(api: Any, server: Server, end: str) -> None:
    server.answer("sandbox.repl.run", server.wait)
    server.answer("sandbox.stop", error_reply(500, -32603) if end == "block" else ok("stopped"))
    sandbox = await done(api.PythonSandbox.create())
    run = begin(sandbox.run, "1")
    assert await asyncio.to_thread(server.began.wait, LONG)
    if end == "block":
        with pytest.raises(InternalError):
            async with entered(sandbox):
                pass
    else:
        await done(getattr(sandbox, end)())
    assert sandbox._http._client is not None
    server.go.set()
    assert (await run).stdout == "42"
    assert sandbox._http._client is None


async def test_create_is_awaited_or_entered(server: Server) -> None:
    sandbox = await PythonSandbox.create(name="a")
    assert isinstance(sandbox, PythonSandbox)
    await sandbox.stop()
    creation = NodeSandbox.create(name="b")
    entered_by_hand = await creation.__aenter__()
    assert isinstance(entered_by_hand, NodeSandbox)
    await creation.__aexit__(None, None, None)
    async with await PythonSandbox.create(name="c"):
        pass
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.stop"] * 3


async def test_create_is_a_coroutine(server: Server) -> None:
    """asyncio.create_task(), TaskGroup.create_task() and asyncio.run() accept only coroutines."""
    task = asyncio.create_task(PythonSandbox.create(name="a"))
    assert "PythonSandbox.create" in repr(task)
    sandboxes = [
        await task,
        *await asyncio.gather(PythonSandbox.create(name="b"), NodeSandbox.create(name="c")),
        await asyncio.wait_for(PythonSandbox.create(name="d"), LONG),
    ]
    if sys.version_info >= (3, 11):
        async with asyncio.TaskGroup() as group:
            grouped = group.create_task(PythonSandbox.create(name="e"))
        sandboxes.append(grouped.result())
    for sandbox in sandboxes:
        await sandbox.run("1")
        await sandbox.stop()
    names = [params["sandbox"] for method, params in server.sent() if method == "sandbox.start"]
    assert sorted(names) == ["a", "b", "c", "d", "e"][: len(sandboxes)]


async def test_create_canceled(server: Server) -> None:
    server.answer("sandbox.start", server.hang)
    never = asyncio.create_task(PythonSandbox.create())
    never.cancel()
    with pytest.raises(asyncio.CancelledError):
        await never
    assert server.sent() == []
    begun = asyncio.create_task(PythonSandbox.create())
    assert await asyncio.to_thread(server.began.wait, LONG)
    begun.cancel()
    with pytest.raises(asyncio.CancelledError):
        await begun
    assert await asyncio.to_thread(server.ended.wait, LONG)


@pytest.mark.usefixtures("server")
async def test_create_that_is_not_awaited() -> None:
    """It causes no warning. The tests turn warnings into errors."""
    PythonSandbox.create()
    closed = PythonSandbox.create()
    closed.close()
    with pytest.raises(RuntimeError, match="already awaited"):
        closed.send(None)
    async with PythonSandbox.create():
        pass
    gc.collect()


# Connections of an event loop that has ended cannot be closed, and Python warns about them.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_several_event_loops_in_sequence(server: Server) -> None:
    sandbox = asyncio.run(PythonSandbox.create())
    assert asyncio.run(sandbox.run("1")).stdout == "42"
    asyncio.run(sandbox.close())
    asyncio.run(sandbox.stop())
    assert [method for method, _ in server.sent()] == ["sandbox.start", "sandbox.repl.run", "sandbox.stop"]
    gc.collect()


@pytest.mark.usefixtures("server")
async def test_several_at_once() -> None:
    async def use(name: str) -> str:
        async with PythonSandbox.create(name=name) as sandbox:
            results = await asyncio.gather(*(sandbox.run(name) for _ in range(5)))
            return ",".join(result.stdout for result in results)

    assert await asyncio.gather(*(use(f"s{i}") for i in range(8))) == ["42,42,42,42,42"] * 8


@pytest.mark.usefixtures("server")
async def test_several_threads() -> None:
    with microsandbox.sync.PythonSandbox.create() as sandbox:
        results = await asyncio.gather(*(asyncio.to_thread(sandbox.run, "1") for _ in range(8)))
    assert [result.stdout for result in results] == ["42"] * 8


@pytest.mark.usefixtures("server")
def test_threads_share_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, created = _http._transport, []

    def slow(config: Any) -> Any:
        created.append(config)
        time.sleep(0.1)  # gives the other threads time to get here, if nothing prevents it
        return transport(config)

    monkeypatch.setattr(_http, "_transport", slow)
    sandbox = microsandbox.sync.PythonSandbox()
    sandbox._is_started = True
    with ThreadPoolExecutor(8) as threads:
        assert [result.stdout for result in threads.map(sandbox.run, "12345678")] == ["42"] * 8
    assert len(created) == 1
    sandbox.close()


@pytest.mark.usefixtures("server")
def test_threads_close_and_call() -> None:
    sandbox = microsandbox.sync.PythonSandbox()
    sandbox._is_started = True

    def use(code: str) -> str:
        stdout = sandbox.run(code).stdout
        sandbox.close()
        return stdout

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(use, ["1"] * 200)) == {"42"}
    assert (sandbox._http._client, sandbox._http._calls) == (None, 0)


async def test_server_url_with_a_path(api: Any, server: Server) -> None:
    async with entered(api.PythonSandbox.create(server_url=server.url + "/below/")):
        pass
    assert server.requests[0].path == "/below/api/v1/rpc"


async def test_with_a_bad_key(api: Any, server: Server) -> None:
    server.answer("sandbox.start", error_reply(401, -32002))
    with pytest.raises(microsandbox.AuthenticationError, match="check api_key or MSB_API_KEY"):
        await done(api.PythonSandbox.create())


async def test_without_a_key(api: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSB_API_KEY")
    server.answer("sandbox.start", error_reply(401, -32002), ok("started"))
    with pytest.raises(microsandbox.AuthenticationError, match="No API key was sent: pass api_key, or set MSB_API_KEY"):
        await done(api.PythonSandbox.create())
    async with entered(api.PythonSandbox.create()):
        pass
    assert all("authorization" not in request.headers for request in server.requests)


@pytest.mark.usefixtures("server")
async def test_no_proxy_for_this_machine(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with entered(api.PythonSandbox.create()):
        pass


def test_objects_cannot_be_pickled(api: Any) -> None:
    sandbox = api.PythonSandbox(name="my-env", api_key=TEST_KEY)
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="create a new one"):
            copying(sandbox)
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            copying(sandbox._config.key)
