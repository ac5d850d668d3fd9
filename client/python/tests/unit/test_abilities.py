"""Tests streams, processes, files, contexts and forwarded ports, with asyncio and blocking."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import microsandbox
from microsandbox import (
    CodeError,
    CodeException,
    CommandExitError,
    ConflictError,
    ConnectionLostError,
    Context,
    FileChange,
    InvalidParamsError,
    Piece,
    RequestTimeoutError,
    RunTimeoutError,
    SandboxNotFoundError,
    UnexpectedAnswerError,
    _http,
)

from ..flavours import begin, done, entered, everything, items
from .stub import (
    CONTEXT,
    FILE_INFO,
    LONG,
    PROCESS_INFO,
    RESULTS,
    TEST_KEY,
    Events,
    Handler,
    Reply,
    Server,
    error_reply,
    ok,
    printed,
    printed_bytes,
)

pytestmark = pytest.mark.anyio

WHICH = {"sandbox": "my-env"}
PNG = base64.b64encode(b"\x89PNG").decode()


@pytest.fixture
async def sandbox(api: Any, server: Server) -> AsyncIterator[Any]:
    """Return a sandbox that is started, without the request for that."""
    started = await done(api.PythonSandbox.create(name="my-env"))
    server.requests.clear()
    yield started
    await done(started.close())


def shown(text: str, **more: Any) -> dict[str, Any]:
    return {"data": {"text/plain": text, **more}, "is_main": True}


EXCEPTION = {"name": "E", "value": "no", "traceback": "Traceback\nE: no\n"}
ENDED = {"status": "error", "language": "python", "output": [], "exit_code": 1, "count": 3, "results": []}


async def test_results(sandbox: Any, server: Server) -> None:
    results = [shown("fig", **{"image/png": PNG, "text/html": "<p>"}), shown("1\n2")]
    output = [{"stream": "stdout", "text": "a"}]
    server.answer("sandbox.repl.run", ok({**ENDED, "output": output, "results": results, "error": EXCEPTION}))
    execution = await done(sandbox.run("x"))
    assert execution.lines == [{"stream": "stdout", "text": text} for text in ("a", "fig", "1", "2")] + [
        {"stream": "stderr", "text": text} for text in ("Traceback", "E: no")
    ]
    first, second = execution.results
    assert (first.text, first.html, first.png, first.jpeg, first.is_main) == ("fig", "<p>", PNG, None, True)
    assert first.formats() == ["text/plain", "image/png", "text/html"]
    assert (first.raw, str(second)) == (results[0]["data"], "1\n2")
    assert execution.png == PNG
    assert execution.exception == CodeException("E", "no", "Traceback\nE: no\n")
    assert (execution.exit_code, execution.count, execution.state_lost) == (1, 3, False)
    with pytest.raises(CodeError, match="E: no") as caught:
        execution.raise_for_status()
    assert (caught.value.name, caught.value.value, caught.value.execution) == ("E", "no", execution)
    server.answer("sandbox.repl.run", ok(RESULTS["sandbox.repl.run"]))
    execution = await done(sandbox.run("x"))
    assert execution.raise_for_status() is execution
    assert (execution.png, execution.exception, execution.results) == (None, None, [])


async def test_formats() -> None:
    data = {
        "text/plain": "a",
        "text/html": "b",
        "text/markdown": "c",
        "image/svg+xml": "d",
        "image/png": "e",
        "image/jpeg": "f",
        "application/pdf": "g",
        "text/latex": "h",
        "application/json": {"i": 1},
        "application/javascript": "j",
        "application/vnd.dataframe+json": {"k": [1]},
    }
    result = microsandbox.Result({"data": data})
    names = ["text", "html", "markdown", "svg", "png", "jpeg", "pdf", "latex", "json", "javascript", "data"]
    assert [getattr(result, name) for name in names] == list(data.values())


async def test_streaming_run(sandbox: Any, server: Server) -> None:
    events = [
        printed("stdout", "a\nb"),
        printed("stderr", "é"),
        printed("stdout", "c\n\n"),
        ("display", shown("shown")),
        ("new event", {"of a later version": True}),
        printed("stderr", "😀\n"),
        printed("stdout", "unfinished"),
        ("display", shown("main")),
        ("exception", EXCEPTION),
        ("result", ENDED),
    ]
    server.answer("sandbox.repl.run", Events(events))
    heard: list[Any] = []
    execution = await done(
        sandbox.run(
            "code",
            on_stdout=lambda text: heard.append(("out", text)),
            on_stderr=lambda text: heard.append(("err", text)),
            on_result=lambda result: heard.append(result.text),
        )
    )
    assert heard == [
        ("out", "a\nb"),
        ("err", "é"),
        ("out", "c\n\n"),
        "shown",
        ("err", "😀\n"),
        ("out", "unfinished"),
        "main",
    ]
    assert [(line["stream"][3:], line["text"]) for line in execution.lines] == [
        ("out", "a"),
        ("out", "bc"),
        ("err", "é😀"),
        ("out", ""),
        ("out", "shown"),
        ("out", "unfinished"),
        ("out", "main"),
        ("err", "Traceback"),
        ("err", "E: no"),
    ]
    assert (execution.status, execution.exit_code, len(execution.results)) == ("error", 1, 2)
    assert execution.exception.name == "E"
    assert server.sent() == [
        ("sandbox.repl.run", {**WHICH, "language": "python", "code": "code", "results": True}),
    ]
    assert server.requests[0].headers["accept"] == "text/event-stream"


async def test_options_of_runs(sandbox: Any, server: Server) -> None:
    server.answer("sandbox.command.run", ok({**RESULTS["sandbox.command.run"], "output": []}))
    options = {"cwd": "/tmp", "envs": {"A": "1"}, "user": "nobody"}
    await done(sandbox.run("x", 5, language="bash", stdin="é", **options))
    context = Context("report", "python", None, None, 0, False)
    await done(sandbox.run("x", context=context))
    await done(sandbox.run("x", context="report", stdin=b"\xff"))
    await done(sandbox.command.run("cat", stdin="é", **options))
    sent = {**WHICH, "cwd": "/tmp", "envs": ["A=1"], "user": "nobody", "stdin": "é"}
    code = {"code": "x", "results": True}
    assert server.sent() == [
        ("sandbox.repl.run", {**sent, **code, "language": "bash", "timeout": 5}),
        ("sandbox.repl.run", {**WHICH, **code, "context": "report"}),
        ("sandbox.repl.run", {**WHICH, **code, "context": "report", "stdin": "/w==", "encoding": "base64"}),
        ("sandbox.command.run", {**sent, "command": "cat", "args": []}),
    ]


async def test_bytes(sandbox: Any, server: Server) -> None:
    pieces = [("stdout", b"a\xc3"), ("stderr", b"\xff"), ("stdout", b"\xa9\n\x00"), ("stdout", b"\xe2\x82")]
    output = [printed_bytes(*piece)[1] for piece in pieces]
    result = {**RESULTS["sandbox.command.run"], "output": output}
    events = [printed_bytes(*piece) for piece in pieces] + [("result", {**result, "output": []})]
    heard: list[bytes] = []
    texts: list[str] = []
    for reply, options in (
        (ok(result), {"text": False, "stdin": "é"}),
        (ok(result), {"stdin": b"\xc3\xa9"}),
        (Events(events), {"text": False, "stdin": "é", "on_stdout": heard.append}),
        (Events(events), {"stdin": b"\xc3\xa9", "on_stdout": texts.append}),
    ):
        server.answer("sandbox.command.run", reply)
        command = await done(sandbox.command.run("cat", **options))
        assert (command.stdout_bytes, command.stderr_bytes) == (b"a\xc3\xa9\n\x00\xe2\x82", b"\xff")
        assert (command.stdout, command.stderr) == ("aé\n\x00\ufffd", "\ufffd")
    assert heard == [b"a\xc3", b"\xa9\n\x00", b"\xe2\x82"]
    assert texts == ["a", "é\n\x00", "\ufffd"]
    params = {**WHICH, "command": "cat", "args": [], "stdin": "w6k=", "encoding": "base64"}
    assert server.sent() == [("sandbox.command.run", params)] * 4


async def test_failed_commands(sandbox: Any) -> None:
    command = await done(sandbox.command.run("sh"))
    with pytest.raises(CommandExitError, match="the exit code is 3: no") as caught:
        command.raise_for_status()
    error = caught.value
    assert (error.exit_code, error.stdout, error.stderr, error.execution) == (3, "hello", "no", command)


TIMED_OUT = {"code": -32007, "message": "the run reached its time limit", "data": {"output": []}}


async def test_errors_have_the_output(api: Any, sandbox: Any, server: Server) -> None:
    error = {**TIMED_OUT, "data": {"output": [{"stream": "stdout", "text": "one"}], "truncated": True}}
    server.answer(
        "sandbox.repl.run", Reply(504, str(ok(None).body).replace('"result": null', f'"error": {_json(error)}'))
    )
    with pytest.raises(RunTimeoutError) as caught:
        await done(sandbox.run("x"))
    execution = caught.value.execution
    assert isinstance(execution, api.Execution)
    assert (execution.stdout, execution.truncated, execution.status) == ("one", True, "error")
    streams: list[tuple[list[Any], type[Exception]]] = [
        ([("error", TIMED_OUT)], RunTimeoutError),
        ([], ConnectionLostError),
        ([("error", {"unexpected": True})], UnexpectedAnswerError),
        ([("output", {"unexpected": True})], UnexpectedAnswerError),
    ]
    for end, kind in streams:
        server.answer("sandbox.command.run", Events([printed("stdout", "one\ntw"), *end]))
        with pytest.raises(kind) as failed:
            await done(sandbox.command.run("sh", ["-c", "x"], on_stdout=str))
        execution = failed.value.execution  # type: ignore[attr-defined]
        assert isinstance(execution, api.CommandExecution)
        assert (execution.stdout, execution.command, execution.args) == ("one\ntw", "sh", ["-c", "x"])
        assert (execution.success, execution.exit_code) == (False, -1)
    assert caught.value.request_id == "REQUEST-ID"
    # A run is never sent again once it has begun. Nothing was printed by a run that was refused.
    assert len(server.requests) == 1 + len(streams)
    server.answer("sandbox.repl.run", error_reply(404, -32003))
    with pytest.raises(SandboxNotFoundError) as refused:
        await done(sandbox.run("x", on_stdout=str))
    assert refused.value.execution is None


def _json(value: Any) -> str:
    import json

    return json.dumps(value)


async def test_a_stream_that_was_not_begun_is_retried(sandbox: Any, server: Server) -> None:
    busy = error_reply(429, -32006, Retry_After="0")
    server.answer(
        "sandbox.command.run", busy, Events([printed("stdout", "a"), ("result", RESULTS["sandbox.command.run"])])
    )
    assert (await done(sandbox.command.run("a", on_stdout=str))).stdout == "a"
    assert len(server.requests) == 2


async def test_not_a_stream(sandbox: Any, server: Server) -> None:
    server.answer("sandbox.repl.run", Reply(200, "<html>"))
    with pytest.raises(UnexpectedAnswerError, match="not a stream of events"):
        await done(sandbox.run("x", on_stdout=str))


def endless(server: Server) -> Any:
    """Return an answer that prints, and then waits until the client has closed the connection."""

    def answer(handler: Handler) -> None:
        handler.begin("text/event-stream")
        name, data = printed("stdout", "a")
        handler.chunk(f"event: {name}\ndata: {_json(data)}\n\n".encode())
        server.hang(handler)

    return answer


async def test_callback_that_raises(sandbox: Any, server: Server) -> None:
    """Its exception ends the run, because the connection is closed."""
    server.answer("sandbox.repl.run", endless(server))

    def callback(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError, match=r"^a$"):
        await done(sandbox.run("x", on_stdout=callback))
    assert await asyncio.to_thread(server.ended.wait, LONG)
    assert sandbox._http._calls == 0


async def test_time_limit_of_a_stream(sandbox: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer("sandbox.process.connect", endless(server))
    process = await done(sandbox.process.start("sleep", tag="worker"))
    with pytest.raises(RequestTimeoutError, match=r"the process has not ended within 0\.2 s") as caught:
        await done(process.wait(timeout=0.2, on_stdout=str))
    assert caught.value.execution.stdout == "a"
    # A connection that is silent for longer than any keep-alive is lost.
    monkeypatch.setattr(_http, "_SILENCE_LIMIT", 0.2)
    with pytest.raises(ConnectionLostError):
        await done(process.wait())


async def test_coroutine_functions_as_callbacks(server: Server) -> None:
    server.answer("sandbox.repl.run", Events([printed("stdout", "a"), ("display", shown("b")), ("result", ENDED)]))
    heard: list[Any] = []

    async def callback(value: Any) -> None:
        await asyncio.sleep(0)
        heard.append(str(value))

    async with microsandbox.PythonSandbox.create() as sandbox:
        await sandbox.run("x", on_stdout=callback, on_result=callback)
    assert heard == ["a", "b"]
    blocking = microsandbox.sync.PythonSandbox.create()
    with pytest.raises(InvalidParamsError, match="on_stdout must not be a coroutine function"):
        blocking.run("x", on_stdout=callback)
    blocking.close()


async def test_wrong_types(sandbox: Any, server: Server, tmp_path: Path) -> None:
    process = await done(sandbox.process.start("true"))
    pty = await done(sandbox.pty.start())
    server.requests.clear()
    calls: list[tuple[Any, str]] = [
        (lambda: sandbox.run(1), "code must be a string, not 1"),
        (lambda: sandbox.run("x", language=1), "language"),
        (lambda: sandbox.run("x", context=1), "context"),
        (lambda: sandbox.run("x", cwd=1), "cwd"),
        (lambda: sandbox.run("x", user=0), "user"),
        (lambda: sandbox.run("x", stdin=5), "stdin must be a string or bytes"),
        (lambda: sandbox.run("x", envs={"A": 1}), r"envs\['A'\] must be a string, not 1"),
        (lambda: sandbox.run("x", envs=[1]), r"envs\[0\] must be a string"),
        (lambda: sandbox.run("x", on_stdout="print"), "on_stdout must be a function"),
        (lambda: sandbox.run("x", on_stderr=1), "on_stderr must be a function"),
        (lambda: sandbox.run("x", on_result=[]), "on_result must be a function"),
        (lambda: sandbox.command.run(["ls"]), "command must be a string"),
        (lambda: sandbox.command.run("echo", "hello"), "args must be a list of strings, not the string 'hello'"),
        (lambda: sandbox.command.run("echo", [1]), r"args\[0\] must be a string, not 1"),
        (lambda: sandbox.command.run("echo", 5), "args must be a list of strings, not 5"),
        (lambda: sandbox.command.run("echo", text=1), "text must be True or False"),
        (lambda: sandbox.process.start("a", tag=1), "tag"),
        (lambda: sandbox.process.start("a", open_stdin="yes"), "open_stdin"),
        (lambda: sandbox.process.connect(1.5), "process must be an integer"),
        (lambda: sandbox.process.connect(True), "process must be an integer"),
        (lambda: sandbox.pty.start(cols="80"), "cols must be an integer"),
        (lambda: pty.resize(80, None), "rows must be an integer"),
        (lambda: pty.send_input(None), "data must be a string or bytes"),
        (lambda: process.send_stdin(3), "data must be a string or bytes"),
        (lambda: process.signal(9), "signal must be a string, not 9"),
        (lambda: process.wait(on_stdout=1), "on_stdout must be a function"),
        (lambda: everything(process.output(replay="no")), "replay"),
        (lambda: sandbox.files.read(b"/a"), "path must be a string"),
        (lambda: sandbox.files.read("/a", "binary"), "format 'binary': use 'text' or 'bytes'"),
        (lambda: sandbox.files.write("/a", 5), "data must be a string or bytes"),
        (lambda: sandbox.files.write("/a", "", mode=1.5), "mode must be a number such as 0o644"),
        (lambda: sandbox.files.list("/a", depth="1"), "depth"),
        (lambda: sandbox.files.remove("/a", recursive=1), "recursive"),
        (lambda: sandbox.files.upload(tmp_path, "/a", on_progress=1), "on_progress must be a function"),
        (lambda: sandbox.files.upload(3, "/a"), "local must be a string"),
        (lambda: sandbox.forward("8000"), "port must be an integer"),
        (lambda: sandbox.forward(0), "port must be a port number, not 0"),
        (lambda: sandbox.forward(80, local_port=65536), "local_port must be a port number"),
        (lambda: sandbox.contexts.create(name=1), "name"),
        (lambda: sandbox.contexts.remove(None), "context must be a string"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidParamsError, match=f"^{message}"):
            await done(call())
    assert server.requests == []


async def test_processes(api: Any, sandbox: Any, server: Server) -> None:
    process = await done(
        sandbox.process.start("sh", ["-c", "x"], stdin=b"a", open_stdin=True, tag="worker", timeout=5, cwd="/tmp")
    )
    assert (process.pid, process.tag, repr(process)) == (42, "worker", "<Process 42 in 'my-env'>")
    again = await done(sandbox.process.connect("worker"))
    assert isinstance(again, api.Process)
    assert (again.pid, again.tag) == (42, "worker")
    assert (await done(sandbox.process.connect(42))).pid == 42
    assert await done(sandbox.process.list()) == [PROCESS_INFO]
    assert await done(process.info()) == PROCESS_INFO
    logs = await done(process.logs())
    assert (logs.stdout, logs.stdout_bytes, logs.skipped_bytes) == ("é", "é".encode(), 3)
    assert (logs.running, logs.exit_code, logs.signal) == (True, None, None)
    with pytest.raises(CommandExitError, match="the process has not ended"):
        logs.raise_for_status()
    await done(process.signal("INT"))
    await done(process.kill())
    await done(process.send_stdin("é"))
    await done(process.close_stdin())
    pid = {**WHICH, "pid": 42}
    started = {"command": "sh", "args": ["-c", "x"], "stdin": "YQ==", "encoding": "base64", "open_stdin": True}
    assert server.sent() == [
        ("sandbox.process.start", {**WHICH, **started, "cwd": "/tmp", "tag": "worker", "timeout": 5}),
        ("sandbox.process.get", {**WHICH, "tag": "worker"}),
        ("sandbox.process.get", pid),
        ("sandbox.process.list", WHICH),
        ("sandbox.process.get", pid),
        ("sandbox.process.logs", {**pid, "encoding": "base64"}),
        ("sandbox.process.signal", {**pid, "signal": "INT", "all": False}),
        ("sandbox.process.signal", {**pid, "signal": "KILL", "all": True}),
        ("sandbox.process.input", {**pid, "data": "w6k=", "encoding": "base64"}),
        ("sandbox.process.input", {**pid, "data": "", "encoding": "base64", "close": True}),
    ]


async def test_long_input_is_sent_in_pieces(sandbox: Any, server: Server) -> None:
    process = await done(sandbox.process.start("cat", open_stdin=True))
    data = os.urandom(1_200_000)
    await done(process.send_stdin(data))
    pieces = [base64.b64decode(params["data"]) for method, params in server.sent() if method.endswith("input")]
    assert len(pieces) == 3
    assert b"".join(pieces) == data


async def test_output_of_a_process(sandbox: Any, server: Server) -> None:
    end = {"skipped_bytes": 7, "running": False, "exit": {"exit_code": 143, "signal": "TERM", "timed_out": False}}
    events = [printed_bytes("stdout", b"a\xc3"), printed_bytes("stderr", b"b\n"), printed_bytes("stdout", b"\xa9")]
    server.answer("sandbox.process.connect", Events([*events, ("result", end)]))
    process = await done(sandbox.process.start("sh"))
    heard: list[str] = []
    result = await done(process.wait(on_stdout=heard.append, on_stderr=heard.append))
    assert heard == ["a", "b\n", "é"]
    assert (result.stdout, result.stderr, result.stdout_bytes) == ("aé", "b", "aé".encode())
    assert (result.exit_code, result.signal, result.timed_out, result.skipped_bytes) == (143, "TERM", False, 7)
    assert not result.running
    with pytest.raises(CommandExitError, match="143"):
        result.raise_for_status()
    pieces = [Piece("stdout", b"a\xc3", "a"), Piece("stderr", b"b\n", "b\n"), Piece("stdout", b"\xa9", "é")]
    assert await everything(process.output()) == pieces
    assert await everything(process.output(replay=False)) == pieces
    pid = {**WHICH, "pid": 42, "encoding": "base64"}
    assert [params for method, params in server.sent() if method.endswith("connect")] == [
        {**pid, "replay": True},
        {**pid, "replay": True},
        {**pid, "replay": False},
    ]


async def test_terminals(api: Any, sandbox: Any, server: Server) -> None:
    end = {"skipped_bytes": 0, "running": False, "exit": {"exit_code": 0, "timed_out": False}}
    server.answer("sandbox.process.connect", Events([printed_bytes("terminal", b"a\xc3"), ("result", end)]))
    pty = await done(sandbox.pty.start(cols=100, rows=30, tag="shell"))
    assert isinstance(pty, api.Pty)
    await done(pty.resize(80, 24))
    await done(pty.send_input("ls\r"))
    assert await everything(pty.output()) == [b"a\xc3"]
    assert (await done(pty.wait())).raise_for_status().stdout == "a\ufffd"
    assert isinstance(await done(sandbox.pty.connect("shell")), api.Pty)
    pid = {**WHICH, "pid": 42}
    assert server.sent()[:3] == [
        (
            "sandbox.process.start",
            {**WHICH, "command": "bash", "args": [], "tag": "shell", "terminal": {"cols": 100, "rows": 30}},
        ),
        ("sandbox.process.resize", {**pid, "cols": 80, "rows": 24}),
        ("sandbox.process.input", {**pid, "data": "bHMN", "encoding": "base64"}),
    ]


@pytest.mark.parametrize("by", ["another task", "the reader"])
async def test_a_stream_is_closed(sandbox: Any, server: Server, by: str) -> None:
    server.answer("sandbox.process.connect", endless(server))
    process = await done(sandbox.process.start("sh"))
    stream = process.output()
    seen = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def read() -> None:
        async for piece in stream:
            assert piece.text == "a"
            loop.call_soon_threadsafe(seen.set)
            if by == "the reader":
                await stream.close()

    def read_blocking() -> None:
        for piece in stream:
            assert piece.text == "a"
            loop.call_soon_threadsafe(seen.set)
            if by == "the reader":
                stream.close()

    reading = begin(read if hasattr(stream, "__aiter__") else read_blocking)
    await asyncio.wait_for(seen.wait(), LONG)
    if by == "another task":
        await done(stream.close())
    await asyncio.wait_for(reading, LONG)
    assert await asyncio.to_thread(server.ended.wait, LONG)
    assert sandbox._http._calls == 0
    assert await everything(stream) == []


async def test_watch(sandbox: Any, server: Server) -> None:
    odd = {"type": "write", "path": "\ufffd", "path_base64": base64.b64encode(b"\xff").decode()}
    changes = [("started", {}), ("change", {"type": "create", "path": "é"}), ("change", odd)]
    server.answer("sandbox.fs.watch", Events([*changes, ("error", {"code": -32003, "message": "it was removed"})]))
    heard = []
    async with entered(sandbox.files.watch("/tmp", recursive=True)) as stream:

        async def listen() -> None:
            async for change in items(stream):
                heard.append(change)

        with pytest.raises(SandboxNotFoundError, match="it was removed"):
            await listen()
    assert heard == [FileChange("create", "é"), FileChange("write", "\udcff")]
    assert server.sent() == [("sandbox.fs.watch", {**WHICH, "path": "/tmp", "recursive": True})]
    # A watch that does not begin fails at once.
    server.answer("sandbox.fs.watch", Events([("error", {"code": -32003, "message": "no such file"})]))
    with pytest.raises(SandboxNotFoundError, match="no such file"):
        async with entered(sandbox.files.watch("/nope")):
            raise AssertionError("the block was entered")
    assert sandbox._http._calls == 0


async def test_descriptions_of_files(sandbox: Any, server: Server) -> None:
    link = {**FILE_INFO, "type": "symlink", "path": "\ufffd", "path_base64": "/w==", "target": FILE_INFO}
    server.answer("sandbox.fs.list", ok({"entries": [link]}))
    files = sandbox.files
    [entry] = await done(files.list("/tmp", depth=2))
    assert (entry["path"], entry["target"]["path"], "path_base64" in entry) == ("\udcff", "/tmp/a", False)
    assert await done(files.stat(Path("/tmp/a"))) == FILE_INFO
    assert await done(files.exists("/tmp/a")) is True
    assert (await done(files.mkdir("/a", mode=0o700, user="u")))["created"] is True
    assert (await done(files.move("/a", "/b"))) == FILE_INFO
    await done(files.remove("/a", recursive=True))
    assert server.sent() == [
        ("sandbox.fs.list", {**WHICH, "path": "/tmp", "depth": 2}),
        ("sandbox.fs.stat", {**WHICH, "path": "/tmp/a"}),
        ("sandbox.fs.exists", {**WHICH, "path": "/tmp/a"}),
        ("sandbox.fs.mkdir", {**WHICH, "path": "/a", "mode": "0700", "user": "u"}),
        ("sandbox.fs.move", {**WHICH, "from": "/a", "to": "/b"}),
        ("sandbox.fs.remove", {**WHICH, "path": "/a", "recursive": True}),
    ]


async def test_contents_of_files(sandbox: Any, server: Server) -> None:
    files = sandbox.files
    odd = "/tmp/é & ?=%#+\udcff"
    info = await done(files.write(odd, "é\n", mode=0o640, user="u"))
    assert (info["type"], info["path"]) == ("file", odd)
    assert await done(files.read(odd)) == "é\n"
    assert await done(files.read(odd, "bytes")) == "é\n".encode()
    await done(files.write("/empty", b"", mode="0600"))
    assert await done(files.read("/empty")) == ""
    server.files["/binary"] = b"\xff" * 300_000
    assert await done(files.read("/binary", format="bytes")) == server.files["/binary"]
    with pytest.raises(ConflictError, match="not UTF-8 text: read it with format='bytes'"):
        await done(files.read("/binary"))
    with pytest.raises(SandboxNotFoundError):
        await done(files.read("/nope"))
    assert server.sent()[:2] == [("PUT", {"path": odd, "mode": "0640", "user": "u"}), ("GET", {"path": odd})]
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TEST_KEY}"}

    def short(handler: Handler) -> None:
        handler.begin("application/octet-stream", "10")
        handler.wfile.write(b"short")
        handler.close_connection = True

    server.files["/short"] = short
    with pytest.raises(ConnectionLostError, match=r"files\.read"):
        await done(files.read("/short"))


async def test_upload_and_download_a_file(sandbox: Any, server: Server, tmp_path: Path) -> None:
    local, copy = tmp_path / "local", tmp_path / "copy"
    local.write_bytes(os.urandom(1_000_000))
    local.chmod(0o750)
    progress: list[int] = []
    await done(sandbox.files.upload(local, "/tmp/a", on_progress=progress.append))
    assert server.files["/tmp/a"] == local.read_bytes()
    assert (progress[-1], progress) == (1_000_000, sorted(progress))
    assert server.sent() == [("PUT", {"path": "/tmp/a", "mode": "0750"})]
    progress.clear()
    await done(sandbox.files.download("/tmp/a", copy, on_progress=progress.append))
    assert copy.read_bytes() == local.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o640  # as the stub describes each file
    assert (progress[-1], progress) == (1_000_000, sorted(progress))
    with pytest.raises(FileNotFoundError):
        await done(sandbox.files.upload(tmp_path / "nope", "/tmp/a"))

    def callback(count: int) -> None:
        raise ZeroDivisionError(count)

    # A download that fails leaves the file as it was, and nothing else.
    for number, failure in enumerate((callback, None)):
        if number:
            server.files["/tmp/a"] = server.drop
        with pytest.raises((ZeroDivisionError, ConnectionLostError)):
            await done(sandbox.files.download("/tmp/a", copy, on_progress=failure))
    assert copy.read_bytes() == local.read_bytes()
    assert [name for name in os.listdir(tmp_path) if "copy" in name] == ["copy"]
    assert sandbox._http._calls == 0


async def test_upload_and_download_a_tree(sandbox: Any, server: Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "é").write_bytes(os.urandom(500_000))
    (source / "link").symlink_to("sub")
    await done(sandbox.files.upload(source, "/tmp/tree"))
    assert server.requests[0].headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(server.files["/tmp/tree"])) as archive:  # type: ignore[arg-type]
        assert archive.getnames() == ["link", "sub", "sub/é"]
    server.answer("sandbox.fs.stat", ok({**FILE_INFO, "type": "directory"}))
    await done(sandbox.files.download("/tmp/tree", tmp_path / "new" / "target"))
    assert (tmp_path / "new" / "target" / "sub" / "é").read_bytes() == (source / "sub" / "é").read_bytes()
    assert os.readlink(tmp_path / "new" / "target" / "link") == "sub"
    assert server.requests[-1].headers["accept"] == "application/x-tar"


async def test_a_hostile_archive_is_refused(sandbox: Any, server: Server, tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    server.files["/tmp/tree"] = file.getvalue()
    server.answer("sandbox.fs.stat", ok({**FILE_INFO, "type": "directory"}))
    with pytest.raises(UnexpectedAnswerError, match=r"'\.\./outside' leads out of the directory"):
        await done(sandbox.files.download("/tmp/tree", tmp_path / "target"))
    assert not (tmp_path / "outside").exists()


@pytest.mark.usefixtures("server")
async def test_a_canceled_download_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.begin("application/octet-stream", "10")
        handler.wfile.write(b"short")
        handler.wfile.flush()
        server.hang(handler)

    server.files["/tmp/a"] = answer
    async with microsandbox.PythonSandbox.create(name="my-env") as sandbox:
        download = asyncio.create_task(sandbox.files.download("/tmp/a", tmp_path / "copy"))
        assert await asyncio.to_thread(server.began.wait, LONG)
        download.cancel()
        with pytest.raises(asyncio.CancelledError):
            await download
        assert await asyncio.to_thread(server.ended.wait, LONG)
    assert not [name for name in os.listdir(tmp_path) if "copy" in name]


async def test_contexts(sandbox: Any, server: Server) -> None:
    context = await done(sandbox.contexts.create(name="report", cwd="/tmp", user="nobody"))
    assert context == Context("report", "python", "/tmp", None, 0, False)
    assert await done(sandbox.contexts.list()) == [context]
    assert await done(sandbox.contexts.restart(context)) == context
    await done(sandbox.contexts.remove("report"))
    server.answer("sandbox.context.create", ok({**CONTEXT, "pid": 5, "busy": True}))
    assert (await done(sandbox.contexts.create("node"))).pid == 5
    which = {**WHICH, "context": "report"}
    assert server.sent() == [
        ("sandbox.context.create", {**which, "language": "python", "cwd": "/tmp", "user": "nobody"}),
        ("sandbox.context.list", WHICH),
        ("sandbox.context.restart", which),
        ("sandbox.context.remove", which),
        ("sandbox.context.create", {**WHICH, "language": "node"}),
    ]


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_forward(sandbox: Any, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    data = os.urandom(500_000)
    async with entered(sandbox.forward(8000)) as forward:
        assert forward.address == ("127.0.0.1", forward.local_port)
        async with connected(forward.address) as (reader, writer), connected(forward.address) as (other, typing):
            typing.write(b"other")
            assert await asyncio.wait_for(other.readexactly(5), LONG) == b"other"
            writer.write(data)
            assert await asyncio.wait_for(reader.readexactly(len(data)), LONG) == data
            typing.write(b"quit")  # the program closes the connection
            assert await asyncio.wait_for(other.read(), LONG) == b"quit"
            # What a client has sent before it ends its side still arrives.
            writer.write(b"quit")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), LONG) == b"quit"
    assert {request.path for request in server.requests} == {"/api/v1/sandboxes/my-env/ports/8000"}
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {TEST_KEY}"}
    assert TEST_KEY not in caplog.text
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*forward.address)


async def test_forward_to_a_program_that_fails(sandbox: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The server's error is not part of what the program sends."""
    async with entered(sandbox.forward(8000)) as forward, connected(forward.address) as (reader, writer):
        writer.write(b"fail")
        assert await asyncio.wait_for(reader.read(), LONG) == b"fail"
    assert caplog.messages == ["connection to port 8000 of sandbox my-env: it failed"]


async def test_forward_is_closed(sandbox: Any, server: Server) -> None:
    forward = await done(sandbox.forward(8000))
    async with connected(forward.address) as (reader, writer):
        writer.write(b"a")
        assert await asyncio.wait_for(reader.readexactly(1), LONG) == b"a"
        await done(forward.close())
        assert await asyncio.wait_for(reader.read(), LONG) == b""
    assert await asyncio.to_thread(server.ended.wait, LONG)
    await done(forward.close())


@pytest.mark.parametrize("status", [404, 307])
async def test_forward_to_nothing(sandbox: Any, server: Server, status: int, caplog: pytest.LogCaptureFixture) -> None:
    reply = error_reply(404, -32003) if status == 404 else Reply(307, "", {"Location": server.url + "/elsewhere"})
    server.files["/api/v1/sandboxes/my-env/ports/8000"] = lambda handler: handler.reply(reply)
    async with entered(sandbox.forward(8000)) as forward, connected(forward.address) as (reader, _):
        assert await asyncio.wait_for(reader.read(), LONG) == b""
    [message] = caplog.messages
    assert message.startswith("connection to port 8000 of sandbox my-env: ")
    assert ("it is so" if status == 404 else "redirects") in message
    assert len(server.requests) == 1
