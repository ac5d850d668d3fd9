"""What is sent again, how long answers are waited for, and what a cancelled call does."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from typing import Any

import anyio
import pytest

from microsandbox import (
    ConnectionLostError,
    MicrosandboxError,
    NodeSandbox,
    PythonSandbox,
    RequestTimeoutError,
    ServerUnreachableError,
    UnavailableError,
)
from microsandbox._core import SandboxCore
from microsandbox._rpc import Call

from ..flavours import done, entered
from .stub import RESULTS, Reply, Server, ok, refusal

pytestmark = pytest.mark.anyio

REPEATABLE = {"sandbox.start", "sandbox.metrics.get"}


def calls(sandbox: Any) -> dict[str, Any]:
    return {
        "sandbox.start": sandbox.start,
        "sandbox.repl.run": lambda: sandbox.run("1"),
        "sandbox.command.run": lambda: sandbox.command.run("true"),
        "sandbox.metrics.get": sandbox.metrics.all,
        "sandbox.stop": sandbox.stop,
    }


@pytest.mark.parametrize(
    "case",
    {
        "busy": ([refusal(429, -32006, Retry_After="0")], 2),
        "away": ([refusal(503, -32009)] * 2, 3),
        "proxy": ([Reply(503, "<html>")], 2),
        "lost": (["drop"], 2),
        "away for long": ([refusal(503, -32009, Retry_After="3600")], 1),
        "answered and done": ([refusal(504, -32007)], 1),
        "internal": ([refusal(500, -32603)], 1),
    }.items(),
    ids=lambda case: case[0],
)
async def test_sent_again(api: Any, server: Server, case: tuple[str, tuple[list[Any], int]]) -> None:
    replies, times = case[1]
    replies = [server.drop if reply == "drop" else reply for reply in replies]
    for method in RESULTS:
        sandbox = api.PythonSandbox()
        sandbox._is_started = method != "sandbox.start"
        server.requests.clear()
        server.answer(method, *replies, ok(RESULTS[method]))
        failed = False
        try:
            await done(calls(sandbox)[method]())
        except MicrosandboxError:
            failed = True
        want = times if method in REPEATABLE else 1
        assert (method, len(server.requests), failed) == (method, want, want <= len(replies))
        await done(sandbox.close())


async def test_in_the_end_the_error_is_told(api: Any, server: Server) -> None:
    server.answer("sandbox.start", refusal(503, -32009, Retry_After="0"))
    with pytest.raises(UnavailableError) as caught:
        await done(api.PythonSandbox.create())
    assert len(server.requests) == 3
    assert caught.value.retry_after == 0


def test_pauses() -> None:
    call = Call("sandbox.start", {}, 1, repeatable=True)
    busy = UnavailableError("", status=503, retry_after=2)
    assert 0.1 <= (call.pause(UnavailableError("", status=503), 1) or 0) <= 0.125
    assert 0.2 <= (call.pause(UnavailableError("", status=503), 2) or 0) <= 0.25
    assert 2 <= (call.pause(busy, 1) or 0) <= 2.5
    assert call.pause(busy, 3) is None


async def test_nothing_listens(api: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        sandbox = api.PythonSandbox(server_url=url)
        for method, call in calls(sandbox).items():
            sandbox._is_started = method != "sandbox.start"
            with pytest.raises(
                ServerUnreachableError, match=f"nothing listens at {url}. Start it with 'msb server start'"
            ):
                await done(call())
        await done(sandbox.close())


async def test_errors_are_told_from_those_around_them(api: Any, server: Server) -> None:
    """A call may be made while another error is handled."""
    server.answer("sandbox.repl.run", server.drop)
    async with entered(api.PythonSandbox.create()) as sandbox:
        try:
            raise ConnectionRefusedError("another")
        except ConnectionRefusedError:
            with pytest.raises(ConnectionLostError, match="Server disconnected"):
                await done(sandbox.run("1"))


@pytest.mark.usefixtures("server")
async def test_a_server_that_comes_up_meanwhile(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not sent is sent again, a run, too."""
    sandbox = await done(api.PythonSandbox.create())
    send = sandbox._http._post
    refused = [ServerUnreachableError("no"), ServerUnreachableError("no")]

    def post(call: Call) -> Any:
        if refused:
            raise refused.pop()
        return send(call)

    async def apost(call: Call) -> Any:
        return await post(call)

    monkeypatch.setattr(sandbox._http, "_post", apost if hasattr(sandbox, "__aenter__") else post)
    assert (await done(sandbox.run("1"))).stdout == "42"
    await done(sandbox.stop())


async def test_no_such_host(api: Any) -> None:
    with pytest.raises(ServerUnreachableError, match="see whether the server runs and its URL is right"):
        await done(api.PythonSandbox.create(server_url="https://sandboxes.invalid"))


@pytest.mark.parametrize("answer", [b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
async def test_a_connection_that_breaks(api: Any, server: Server, answer: bytes) -> None:
    def broken(handler: Any) -> None:
        handler.wfile.write(answer)
        server.drop(handler)

    server.answer("sandbox.repl.run", broken)
    async with entered(api.PythonSandbox.create()) as sandbox:
        with pytest.raises(ConnectionLostError, match="may have been done, or not"):
            await done(sandbox.run("1"))
    assert len(server.requests) == 3


async def test_no_answer(api: Any, server: Server) -> None:
    server.answer("sandbox.start", server.hang)
    with pytest.raises(RequestTimeoutError, match=r"sandbox.start: no answer within 0.2 s"):
        await done(api.PythonSandbox.create(timeout=0.2))
    assert await asyncio.to_thread(server.ended.wait, 30)
    assert len(server.requests) == 1


def test_limits() -> None:
    core = SandboxCore.__new__(PythonSandbox)
    core._name, core._namespace, core._is_started = "a", None, True
    assert core._code_call("1", None).limit is None
    assert core._code_call("1", 0).limit is None
    assert core._code_call("1", 1.5).limit == 121.5
    assert core._command_call("true", None, 10).limit == 130
    assert core._start_call("i", None, None, None, None, None, 7).limit == 7
    assert core._stop_call().limit == 120
    assert core._metrics_call().limit == 30
    # Nothing but these lasts as long as the caller likes.
    assert core._code_call("1", None).params == {"sandbox": "a", "language": "python", "code": "1"}


async def test_cancel(server: Server) -> None:
    """Cancelling a call closes its connection: that is how the server knows."""
    server.answer("sandbox.repl.run", server.hang, ok(RESULTS["sandbox.repl.run"]))
    async with PythonSandbox.create() as sandbox:
        run = asyncio.create_task(sandbox.run("while True: pass"))
        assert await asyncio.to_thread(server.began.wait, 30)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert await asyncio.to_thread(server.ended.wait, 30)
        assert (await sandbox.run("6 * 7")).stdout == "42"


async def test_a_limit_of_asyncio(server: Server) -> None:
    server.answer("sandbox.command.run", server.hang)
    async with NodeSandbox.create() as sandbox:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.command.run("sleep", ["600"]), 0.2)
        assert await asyncio.to_thread(server.ended.wait, 30)


async def test_cancelled_while_it_starts(server: Server) -> None:
    server.answer("sandbox.start", server.hang)
    creation = PythonSandbox.create()
    start = asyncio.create_task(creation.__aenter__())
    assert await asyncio.to_thread(server.began.wait, 30)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await asyncio.to_thread(server.ended.wait, 30)
    assert [method for method, _ in server.sent()] == ["sandbox.start"]


async def test_a_cancelled_block_stops_its_sandbox(server: Server) -> None:
    server.answer("sandbox.repl.run", server.hang)

    async def block() -> None:
        async with PythonSandbox.create() as sandbox:
            await sandbox.run("while True: pass")

    task = asyncio.create_task(block())
    assert await asyncio.to_thread(server.began.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.sent()[-1][0] == "sandbox.stop"


async def test_a_scope_that_cancels_again_and_again(server: Server) -> None:
    """Scopes as those of anyio cancel whatever their task waits for, the stop at the end, too."""
    before = asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with PythonSandbox.create() as sandbox:
            scope.cancel()
    await asyncio.gather(*(asyncio.all_tasks() - before))
    assert server.sent()[-1][0] == "sandbox.stop"
    assert repr(sandbox).endswith(", not started>")


def test_interrupt(server: Server) -> None:
    """Ctrl-C in a blocking call closes its connection, and the block's end stops the sandbox."""
    server.answer("sandbox.repl.run", server.hang)
    program = (
        # Whoever runs the tests may ignore it, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from microsandbox.sync import PythonSandbox\n"
        "with PythonSandbox.create() as sandbox:\n"
        "    sandbox.run('while True: pass')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        assert server.began.wait(30)
        process.send_signal(2)
        _, stderr = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in stderr
    assert server.ended.wait(30)
    assert server.sent()[-1][0] == "sandbox.stop"
