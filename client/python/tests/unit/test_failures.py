"""Tests which calls are retried, how long responses are awaited, and what canceling a call does."""

from __future__ import annotations

import asyncio
import math
import socket
import subprocess
import sys
from decimal import Decimal
from typing import Any

import anyio
import httpx
import pytest

from microsandbox import (
    ConnectionLostError,
    InvalidParamsError,
    MicrosandboxError,
    NodeSandbox,
    PythonSandbox,
    RequestTimeoutError,
    ResourceExhaustedError,
    ServerUnreachableError,
    UnavailableError,
)
from microsandbox._core import SandboxCore
from microsandbox._http import Timeouts
from microsandbox._rpc import Call, Deadline

from ..flavours import done, entered
from .stub import LONG, RESULTS, Reply, Server, error_reply, ok

pytestmark = pytest.mark.anyio

REPEATABLE = {
    "sandbox.start",
    "sandbox.list",
    "sandbox.get",
    "sandbox.metrics.get",
    "sandbox.process.logs",
    "sandbox.process.get",
    "sandbox.process.list",
    "sandbox.process.resize",
    "sandbox.fs.list",
    "sandbox.fs.stat",
    "sandbox.fs.exists",
    "sandbox.context.list",
}


def calls(api: Any, sandbox: Any) -> dict[str, Any]:
    process, pty = api.Process(sandbox, 42, None), api.Pty(sandbox, 42, None)
    return {
        "sandbox.process.start": lambda: sandbox.process.start("true"),
        "sandbox.process.logs": process.logs,
        "sandbox.process.get": process.info,
        "sandbox.process.list": sandbox.process.list,
        "sandbox.process.signal": process.kill,
        "sandbox.process.input": process.close_stdin,
        "sandbox.process.resize": lambda: pty.resize(80, 24),
        "sandbox.fs.list": lambda: sandbox.files.list("/"),
        "sandbox.fs.stat": lambda: sandbox.files.stat("/"),
        "sandbox.fs.exists": lambda: sandbox.files.exists("/"),
        "sandbox.fs.mkdir": lambda: sandbox.files.mkdir("/a"),
        "sandbox.fs.move": lambda: sandbox.files.move("/a", "/b"),
        "sandbox.fs.remove": lambda: sandbox.files.remove("/a"),
        "sandbox.context.create": sandbox.contexts.create,
        "sandbox.context.list": sandbox.contexts.list,
        "sandbox.context.restart": lambda: sandbox.contexts.restart("a"),
        "sandbox.context.remove": lambda: sandbox.contexts.remove("a"),
        "sandbox.start": sandbox.start,
        "sandbox.repl.run": lambda: sandbox.run("1"),
        "sandbox.command.run": lambda: sandbox.command.run("true"),
        "sandbox.list": lambda: api.list_sandboxes(server_url=sandbox.server_url),
        "sandbox.get": sandbox.info,
        "sandbox.metrics.get": sandbox.metrics.all,
        "sandbox.stop": sandbox.stop,
    }


@pytest.mark.parametrize(
    "case",
    {
        "busy": ([error_reply(429, -32006, Retry_After="0")], 2),
        "busy before a proxy": ([Reply(429, "<html>", {"Retry-After": "0"})] * 2, 3),
        "printed too much": ([error_reply(429, -32006)], 2),
        "busy for a long time": ([error_reply(429, -32006, Retry_After="3600")], 1),
        "unavailable": ([error_reply(503, -32009)] * 2, 3),
        "proxy": ([Reply(503, "<html>")], 2),
        "lost": (["drop"], 2),
        "unavailable for a long time": ([error_reply(503, -32009, Retry_After="3600")], 1),
        "run timed out": ([error_reply(504, -32007)], 1),
        "run failed": ([error_reply(502, -32010)], 1),
        "run failed, behind a proxy that adds Retry-After": ([error_reply(502, -32010, Retry_After="0")], 1),
        "internal": ([error_reply(500, -32603)], 1),
    }.items(),
    ids=lambda case: case[0],
)
async def test_retries(api: Any, server: Server, case: tuple[str, tuple[list[Any], int]]) -> None:
    replies, times = case[1]
    replies = [server.drop if reply == "drop" else reply for reply in replies]
    for method in RESULTS:
        sandbox = api.PythonSandbox()
        sandbox._is_started = method != "sandbox.start"
        server.requests.clear()
        server.answer(method, *replies, ok(RESULTS[method]))
        failed = False
        try:
            await done(calls(api, sandbox)[method]())
        except MicrosandboxError:
            failed = True
        # 429 with Retry-After means that the call did not begin.
        want = times if method in REPEATABLE or case[0].startswith("busy") else 1
        assert (method, len(server.requests), failed) == (method, want, want <= len(replies))
        await done(sandbox.close())


async def test_last_error_is_raised(api: Any, server: Server) -> None:
    server.answer("sandbox.start", error_reply(503, -32009, Retry_After="0"))
    with pytest.raises(UnavailableError) as caught:
        await done(api.PythonSandbox.create())
    assert len(server.requests) == 3
    assert caught.value.retry_after == 0


def test_pauses() -> None:
    call = Call("sandbox.start", {}, 1, idempotent=True)
    run = Call("sandbox.repl.run", {}, None)
    unavailable = UnavailableError("", status=503)
    for busy in (
        UnavailableError("", status=503, retry_after=2),
        ResourceExhaustedError("", status=429, retry_after=2),
    ):
        assert 2 <= (call.pause(busy, 1, 60) or 0) <= 2.5
        assert call.pause(busy, 1, 1.9) is None
        assert call.pause(busy, 3, 60) is None
    assert 0.1 <= (call.pause(unavailable, 1, 60) or 0) <= 0.125
    assert 0.2 <= (call.pause(unavailable, 2, math.inf) or 0) <= 0.25
    assert run.pause(unavailable, 1, math.inf) is None
    assert 2 <= (run.pause(busy, 1, math.inf) or 0) <= 2.5


async def test_nothing_listens(api: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        sandbox = api.PythonSandbox(server_url=url)
        for method, call in calls(api, sandbox).items():
            sandbox._is_started = method != "sandbox.start"
            with pytest.raises(
                ServerUnreachableError, match=f"nothing listens at {url}. Start it with 'msb server start'"
            ):
                await done(call())
        await done(sandbox.close())


async def test_call_while_another_error_is_handled(api: Any, server: Server) -> None:
    """The error that is being handled must not be taken for the cause of the call's error."""
    server.answer("sandbox.repl.run", server.drop)
    async with entered(api.PythonSandbox.create()) as sandbox:
        try:
            raise ConnectionRefusedError("another")
        except ConnectionRefusedError:
            with pytest.raises(ConnectionLostError, match="Server disconnected"):
                await done(sandbox.run("1"))


@pytest.mark.usefixtures("server")
async def test_server_that_starts_during_the_retries(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call that could not be sent is retried, even a run."""
    sandbox = await done(api.PythonSandbox.create())
    send = sandbox._http._send
    refused = [ServerUnreachableError("no"), ServerUnreachableError("no")]

    def post(*call: Any) -> Any:
        if refused:
            raise refused.pop()
        return send(*call)

    async def apost(*call: Any) -> Any:
        return await post(*call)

    monkeypatch.setattr(sandbox._http, "_send", apost if hasattr(sandbox, "__aenter__") else post)
    assert (await done(sandbox.run("1"))).stdout == "42"
    await done(sandbox.stop())


async def test_no_such_host(api: Any) -> None:
    with pytest.raises(ServerUnreachableError, match="check that the server is running and that its URL is right"):
        await done(api.PythonSandbox.create(server_url="https://sandboxes.invalid"))


@pytest.mark.parametrize("answer", [b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
async def test_broken_connection(api: Any, server: Server, answer: bytes) -> None:
    def broken(handler: Any) -> None:
        handler.wfile.write(answer)
        server.drop(handler)

    server.answer("sandbox.repl.run", broken)
    async with entered(api.PythonSandbox.create()) as sandbox:
        with pytest.raises(ConnectionLostError, match="the call may have taken effect"):
            await done(sandbox.run("1"))
    assert len(server.requests) == 3


@pytest.mark.usefixtures("patient")
async def test_no_response(api: Any, server: Server) -> None:
    server.answer("sandbox.start", server.hang)
    with pytest.raises(RequestTimeoutError, match=r"sandbox.start: no answer within 0.2 s"):
        await done(api.PythonSandbox.create(timeout=0.2))
    assert await asyncio.to_thread(server.ended.wait, LONG)
    assert len(server.requests) == 1


@pytest.mark.usefixtures("patient")
async def test_slow_response(api: Any, server: Server) -> None:
    """Each part of the response arrives in time, but the complete response does not."""
    server.answer("sandbox.start", server.drip)
    with pytest.raises(RequestTimeoutError, match=r"sandbox.start: no answer within 0.5 s"):
        await done(api.PythonSandbox.create(timeout=0.5))
    assert await asyncio.to_thread(server.ended.wait, LONG)


async def test_no_connection_in_time(api: Any, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def connect(request: httpx.Request) -> httpx.Response:
        limits.append(request.extensions["timeout"].get("connect"))
        clock.now += limits[-1]
        raise httpx.ConnectTimeout("", request=request)

    sandbox = api.PythonSandbox()
    kind = httpx.AsyncClient if hasattr(sandbox, "__aenter__") else httpx.Client
    client = kind(transport=httpx.MockTransport(connect), base_url=sandbox.server_url)
    monkeypatch.setattr(sandbox._http, "_open", lambda: client)
    with pytest.raises(RequestTimeoutError, match=r"^sandbox.start: no connection to http://.* within 25 s"):
        await done(sandbox.start(timeout=25))
    assert limits == [10, 10, 5]
    sandbox._is_started = True
    with pytest.raises(ServerUnreachableError, match=r"^no connection to http://.* within 10 s"):
        await done(sandbox.run("1"))
    assert limits == [10, 10, 5, 10, 10, 10]


async def test_one_limit_for_all_attempts(api: Any, server: Server, clock: Any) -> None:
    def busy(handler: Any) -> None:
        clock.now += 100
        handler.reply(error_reply(503, -32009, Retry_After="0"))

    server.answer("sandbox.start", busy)
    cases: list[tuple[float, int, type[Exception]]] = [
        (50, 1, RequestTimeoutError),
        (100.05, 1, UnavailableError),  # no time to pause
        (150, 2, RequestTimeoutError),
        (250, 3, RequestTimeoutError),
        (350, 3, UnavailableError),
    ]
    for limit, attempts, error in cases:
        server.requests.clear()
        with pytest.raises(error):
            await done(api.PythonSandbox.create(timeout=limit))
        assert (limit, len(server.requests)) == (limit, attempts)


def test_one_limit_for_all_steps(clock: Any) -> None:
    timeouts = Timeouts(Deadline(60), Call("sandbox.repl.run", {}, 60))
    assert (timeouts.get("connect"), timeouts.get("write"), timeouts.get("read")) == (10, 60, 60)
    clock.now += 55
    assert (timeouts.get("connect"), timeouts.get("write"), timeouts.get("read")) == (5, 5, 5)
    timeouts.check()
    clock.now += 10
    assert 0 < timeouts.get("read") < 0.01
    assert timeouts.get("pool") is None
    with pytest.raises(httpx.ReadTimeout):
        timeouts.check()
    unlimited = Timeouts(Deadline(None), Call("sandbox.repl.run", {}, None))
    assert (unlimited.get("connect"), unlimited.get("write"), unlimited.get("read")) == (10, None, None)
    unlimited.check()


@pytest.mark.parametrize("timeout", [math.nan, -1, -math.inf, True, "5", Decimal(5), [5]])
async def test_invalid_timeouts(api: Any, server: Server, timeout: Any) -> None:
    sandbox = api.PythonSandbox()
    calls: list[Any] = [
        lambda: sandbox.start(timeout=timeout),
        lambda: api.PythonSandbox.create(timeout=timeout),
        lambda: sandbox.run("1", timeout=timeout),
        lambda: sandbox.command.run("true", timeout=timeout),
    ]
    for number, call in enumerate(calls):
        sandbox._is_started = number > 1
        with pytest.raises(InvalidParamsError, match=r"^timeout .*: give a number of seconds, 0 or more") as caught:
            await done(call())
        assert isinstance(caught.value, ValueError)
        assert caught.value.code is None
    assert server.sent() == []


@pytest.mark.parametrize("timeout", [0, 0.5, 1e9, 10**12, 1e300, 10**400, math.inf])
async def test_short_and_long_timeouts(api: Any, server: Server, timeout: Any) -> None:
    sandbox = await done(api.PythonSandbox.create(timeout=timeout if timeout != 0.5 else 60))
    await done(sandbox.run("1", timeout=timeout))
    await done(sandbox.command.run("true", timeout=timeout))
    await done(sandbox.stop())
    sent = [params.get("timeout") for method, params in server.sent() if method.endswith("run")]
    assert sent == [None if timeout == math.inf else timeout] * 2


def test_limits() -> None:
    core = SandboxCore.__new__(PythonSandbox)
    core._name, core._namespace, core._is_started = "a", None, True
    for given, limit in ((None, None), (0, None), (1.5, 121.5), (math.inf, None)):
        assert core._run_call("sandbox.repl.run", {}, given, {}).limit == limit
    for given, limit in ((7, 7), (None, 180), (0, None), (math.inf, None)):
        assert core._start_call("i", None, None, None, None, None, None, None, None, given).limit == limit
    assert core._stop_call().limit == 120
    assert core._metrics_call().limit == 30
    # A run without a timeout sends none.
    assert core._run_call("sandbox.repl.run", {"code": "1"}, None, {}).params == {"sandbox": "a", "code": "1"}


async def test_cancel(server: Server) -> None:
    """Canceling a call closes its connection, which tells the server to end the run."""
    server.answer("sandbox.repl.run", server.hang, ok(RESULTS["sandbox.repl.run"]))
    async with PythonSandbox.create() as sandbox:
        run = asyncio.create_task(sandbox.run("while True: pass"))
        assert await asyncio.to_thread(server.began.wait, LONG)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert await asyncio.to_thread(server.ended.wait, LONG)
        assert (await sandbox.run("6 * 7")).stdout == "42"


async def test_asyncio_wait_for(server: Server) -> None:
    server.answer("sandbox.command.run", server.hang)
    async with NodeSandbox.create() as sandbox:
        run = asyncio.create_task(sandbox.command.run("sleep", ["600"]))
        assert await asyncio.to_thread(server.began.wait, LONG)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run, 0.2)
        assert await asyncio.to_thread(server.ended.wait, LONG)


async def test_canceled_start(server: Server) -> None:
    server.answer("sandbox.start", server.hang)
    creation = PythonSandbox.create()
    start = asyncio.create_task(creation.__aenter__())
    assert await asyncio.to_thread(server.began.wait, LONG)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await asyncio.to_thread(server.ended.wait, LONG)
    assert [method for method, _ in server.sent()] == ["sandbox.start"]


async def test_canceled_block_stops_its_sandbox(server: Server) -> None:
    server.answer("sandbox.repl.run", server.hang)

    async def block() -> None:
        async with PythonSandbox.create() as sandbox:
            await sandbox.run("while True: pass")

    task = asyncio.create_task(block())
    assert await asyncio.to_thread(server.began.wait, LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.sent()[-1][0] == "sandbox.stop"


async def test_canceled_anyio_scope_stops_its_sandbox(server: Server) -> None:
    """A canceled anyio scope cancels everything that its task waits for. The final stop must still be sent."""
    before = asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with PythonSandbox.create() as sandbox:
            scope.cancel()
    await asyncio.gather(*(asyncio.all_tasks() - before))
    assert server.sent()[-1][0] == "sandbox.stop"
    assert repr(sandbox).endswith(", not started>")


def test_interrupt(server: Server) -> None:
    """Ctrl-C in a blocking call closes its connection, and the end of the block stops the sandbox."""
    server.answer("sandbox.repl.run", server.hang)
    program = (
        # The process that runs the tests may ignore SIGINT, and child processes inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from microsandbox.sync import PythonSandbox\n"
        "with PythonSandbox.create() as sandbox:\n"
        "    sandbox.run('while True: pass')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        assert server.began.wait(LONG)
        process.send_signal(2)
        _, stderr = process.communicate(timeout=LONG)
    assert b"KeyboardInterrupt" in stderr
    assert server.ended.wait(LONG)
    assert server.sent()[-1][0] == "sandbox.stop"
