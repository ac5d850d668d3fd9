"""Tests of the package with a real server and real sandboxes, with asyncio and blocking."""

from __future__ import annotations

import asyncio
import base64
import inspect
import os
import signal
import struct
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from microsandbox import (
    AuthenticationError,
    CodeError,
    CommandExitError,
    CommandNotFoundError,
    ConflictError,
    FileChange,
    InvalidParamsError,
    InvalidRequestError,
    ParseError,
    PythonSandbox,
    RequestTimeoutError,
    RunTimeoutError,
    SandboxNotFoundError,
    ServerUnreachableError,
    UnexpectedAnswerError,
)

from ..flavours import FLAVOURS, done, entered, items
from ..trees import described, make_tree

pytestmark = pytest.mark.anyio

both = pytest.mark.parametrize("api", FLAVOURS, indirect=True, ids=lambda flavour: flavour.__name__)

# Seconds after which a test gives up. No operation takes this long, even on a slow machine.
LONG = 300.0


@pytest.fixture
async def python(api: Any, python_name: str) -> AsyncIterator[Any]:
    """Return an object for the shared Python sandbox. Starting it again has no effect."""
    sandbox = api.PythonSandbox(name=python_name)
    await done(sandbox.start())
    yield sandbox
    await done(sandbox.close())


@pytest.fixture
async def node(api: Any, node_name: str) -> AsyncIterator[Any]:
    """Return an object for the shared JavaScript sandbox."""
    sandbox = api.NodeSandbox(name=node_name)
    await done(sandbox.start())
    yield sandbox
    await done(sandbox.close())


@both
async def test_python(python: Any) -> None:
    await done(python.run("import math\nx = 6"))
    execution = await done(python.run("print('é 😀')\nx * 7"))
    assert (execution.status, execution.language, execution.has_error()) == ("success", "python", False)
    assert await done(execution.output()) == "é 😀\n42"
    execution = await done(python.run("1 / 0"))
    assert (execution.status, execution.has_error()) == ("error", True)
    assert "ZeroDivisionError" in await done(execution.error())
    execution = await done(python.run("import sys; print('careful', file=sys.stderr); x"))
    assert (execution.status, execution.has_error()) == ("success", True)
    assert (execution.stdout, execution.stderr) == ("6", "careful")


async def test_node(node: Any) -> None:
    await done(node.run("let x = 6"))
    execution = await done(node.run("console.log('é 😀'); x * 7"))
    assert (execution.status, execution.language) == ("success", "nodejs")
    assert execution.stdout == "é 😀\n42"
    execution = await done(node.run("throw new TypeError('no')"))
    assert (execution.status, execution.has_error()) == ("error", True)
    assert "TypeError: no" in execution.stderr
    assert (await done(node.run("x"))).stdout == "6"


@both
async def test_commands(python: Any) -> None:
    command = await done(python.command.run("sh", ["-c", 'echo "$0 $1"; echo no >&2; exit 3', "a b", "é"]))
    assert (command.exit_code, command.success) == (3, False)
    assert (command.command, command.args[2:]) == ("sh", ["a b", "é"])
    assert await done(command.output()) == "a b é"
    assert await done(command.error()) == "no"
    command = await done(python.command.run("true"))
    assert (command.exit_code, command.success, command.stdout) == (0, True, "")
    with pytest.raises(CommandNotFoundError) as caught:
        await done(python.command.run("no-such-program"))
    assert (caught.value.code, caught.value.status) == (-32008, 422)
    assert caught.value.request_id


async def test_time_limits(python: Any) -> None:
    await done(python.run("kept = 1"))
    with pytest.raises(RunTimeoutError) as caught:
        await done(python.run("while True: pass", timeout=1))
    assert isinstance(caught.value, TimeoutError)
    assert (caught.value.code, caught.value.status) == (-32007, 504)
    assert (await done(python.run("kept", timeout=LONG))).stdout == "1"
    with pytest.raises(RunTimeoutError):
        await done(python.command.run("sleep", ["600"], timeout=1))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# A black pixel.
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    [
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(b"\0\0")),
        chunk(b"IEND", b""),
    ]
)


async def test_results(python: Any, node: Any) -> None:
    code = f"class Plot:\n    def _repr_png_(self): return {PNG!r}\nprint('before'); display(Plot()); 6 * 7"
    heard: list[Any] = []
    for callback in (None, heard.append):
        execution = (await done(python.run(code, on_result=callback))).raise_for_status()
        assert base64.b64decode(execution.png) == PNG
        plot, answer = execution.results
        assert (plot.is_main, plot.formats()) == (False, ["image/png", "text/plain"])
        assert (answer.is_main, answer.text, str(answer)) == (True, "42", "42")
        assert [line["text"][:6] for line in execution.lines] == ["before", "<__mai", "42"]
        assert (execution.exit_code, execution.state_lost) == (0, False)
    assert [result.formats() for result in heard] == [["image/png", "text/plain"], ["text/plain"]]
    execution = await done(node.run("display.html('<b>'); display.json({a: [1]})"))
    assert [execution.results[0].html, execution.results[1].json] == ["<b>", {"a": [1]}]


async def test_exceptions(python: Any) -> None:
    for callback in (None, str):
        execution = await done(python.run("print('a')\n{}['x']", on_stdout=callback))
        assert (execution.exception.name, execution.exception.value) == ("KeyError", "'x'")
        assert execution.exception.traceback.startswith("Traceback")
        assert (execution.stdout, execution.stderr) == ("a", execution.exception.traceback.rstrip())
        with pytest.raises(CodeError, match="KeyError: 'x'") as caught:
            execution.raise_for_status()
        assert (caught.value.name, caught.value.execution) == ("KeyError", execution)
    command = await done(python.command.run("sh", ["-c", "echo no >&2; exit 3"]))
    with pytest.raises(CommandExitError, match="the exit code is 3: no") as failed:
        command.raise_for_status()
    assert (failed.value.exit_code, failed.value.stderr) == (3, "no")
    assert (await done(python.command.run("true"))).raise_for_status().success


def answering(sandbox: Any, path: str, heard: list[Any]) -> Any:
    """Return a callback that writes a file in the sandbox, for which the run waits."""

    async def coroutine_function(text: str) -> None:
        heard.append(text)
        await sandbox.files.write(path, "go")

    def function(text: str) -> None:
        heard.append(text)
        sandbox.files.write(path, "go")

    return coroutine_function if inspect.iscoroutinefunction(sandbox.run) else function


async def test_output_is_streamed(api: Any, python: Any) -> None:
    """The callback gets the output while the run waits for it."""
    path = f"/tmp/go-{api.__name__}"
    heard: list[str] = []
    code = f"import os, time\nprint('é')\nwhile not os.path.exists('{path}-1'): time.sleep(.05)\n6 * 7"
    execution = await done(python.run(code, on_stdout=answering(python, f"{path}-1", heard)))
    assert ("".join(heard), execution.stdout) == ("é\n", "é\n42")
    heard.clear()
    script = f"echo no >&2; until [ -e {path}-2 ]; do sleep .05; done; echo yes"
    command = await done(python.command.run("sh", ["-c", script], on_stderr=answering(python, f"{path}-2", heard)))
    assert (heard, command.lines[-1]) == (["no\n"], {"stream": "stdout", "text": "yes"})


async def test_callback_that_raises(python: Any) -> None:
    """The run ends, so the next one does not wait for it."""

    def callback(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError):
        await done(python.run("kept = 3\nprint('a')\nwhile True: pass", on_stdout=callback))
    assert (await done(python.run("kept", timeout=LONG))).stdout == "3"


async def test_partial_output(python: Any) -> None:
    for callback in (None, str):
        with pytest.raises(RunTimeoutError) as caught:
            await done(python.run("print('one')\nwhile True: pass", timeout=1, on_stdout=callback))
        assert caught.value.execution.stdout == "one"
        script = "echo one; echo no >&2; exec sleep 600"
        with pytest.raises(RunTimeoutError) as caught:
            await done(python.command.run("sh", ["-c", script], timeout=1, on_stdout=callback))
        assert (caught.value.execution.stdout, caught.value.execution.stderr) == ("one", "no")


async def test_options_of_runs(python: Any) -> None:
    options = {"cwd": "/tmp", "envs": {"GREETING": "é"}, "user": "nobody"}
    script = 'pwd; echo "$GREETING"; id -un; cat'
    wanted = "/tmp\né\nnobody\n😀"
    assert (await done(python.command.run("sh", ["-c", script], stdin="😀", **options))).stdout == wanted
    assert (await done(python.run(script, language="bash", stdin="😀", **options))).stdout == wanted
    code = "import getpass, os\nprint(os.getcwd(), os.environ['GREETING'], getpass.getuser(), input(), sep='\\n')"
    assert (await done(python.run(code, stdin="😀", **options))).stdout == wanted


async def test_bytes(python: Any) -> None:
    """Bytes that are not UTF-8, and every other byte, pass unchanged."""
    data = bytes(range(256)) * 400
    pieces: list[bytes] = []
    for callback in (None, pieces.append):
        command = await done(python.command.run("cat", stdin=data, text=False, on_stdout=callback))
        assert command.stdout_bytes == data
    assert b"".join(pieces) == data
    script = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read());"
    assert (await done(python.run(script, stdin=b"\xc3\xa9\xff"))).stdout == "é\ufffd"


@both
async def test_processes(api: Any, python: Any) -> None:
    tag = f"worker-{api.__name__}"
    script = "echo ready; cat; echo end >&2; exec sleep 600"
    process = await done(python.process.start("sh", ["-c", script], stdin="1\n", open_stdin=True, tag=tag))
    same = await done(python.process.connect(tag))
    assert (same.pid, (await done(python.process.connect(process.pid))).tag) == (process.pid, tag)
    await done(same.send_stdin(b"\xff\n"))
    await done(same.close_stdin())
    found = dict.fromkeys(("stdout", "stderr"), b"")
    async with entered(process.output()) as output:
        async for piece in items(output):
            found[piece.stream] += piece.data
            if found["stderr"]:
                break
    assert found == {"stdout": b"ready\n1\n\xff\n", "stderr": b"end\n"}
    with pytest.raises(RequestTimeoutError, match="has not ended") as caught:
        await done(process.wait(timeout=0.5))
    assert caught.value.execution.stderr == "end"
    info = await done(process.info())
    assert (info["running"], info["command"], info["tag"]) == (True, "sh", tag)
    assert info in await done(python.process.list())
    assert (await done(process.logs())).running
    await done(process.signal("TERM"))
    heard: list[str] = []
    result = await done(process.wait(timeout=LONG, on_stdout=heard.append))
    assert (result.exit_code, result.signal, result.timed_out, result.running) == (143, "TERM", False, False)
    assert result.stdout_bytes == found["stdout"]
    assert "".join(heard) == "ready\n1\n\ufffd\n"
    logs = await done(process.logs())
    assert (logs.stdout_bytes, logs.exit_code, logs.running) == (found["stdout"], 143, False)
    with pytest.raises(SandboxNotFoundError):
        await done(python.process.connect("no-such-tag"))
    killed = await done(python.process.start("sh", ["-c", "sleep 600 & sleep 600"], timeout=600))
    await done(killed.kill())
    assert (await done(killed.wait(timeout=LONG))).signal == "KILL"
    late = await done(python.process.start("sleep", ["600"], timeout=1))
    assert (await done(late.wait(timeout=LONG))).timed_out


# A full-screen program that shows the size of its terminal, again after each key, and ends at the key q.
SCREEN = """
import curses, os

def main(screen):
    key = ""
    while key != "q":
        cols, rows = os.get_terminal_size()
        if curses.is_term_resized(rows, cols):
            curses.resizeterm(rows, cols)
        screen.clear()
        screen.border()
        screen.addstr(1, 1, f"{cols} columns, {rows} rows, é")
        screen.refresh()
        key = screen.get_wch()

curses.wrapper(main)
"""


async def test_terminal(api: Any, python: Any) -> None:
    await done(python.files.write("/tmp/screen.py", SCREEN))
    envs = {"TERM": "xterm", "LANG": "C.UTF-8"}
    tag = f"screen-{api.__name__}"
    size = {"cols": 60, "rows": 10}
    pty = await done(python.pty.start("python3", ["/tmp/screen.py"], **size, envs=envs, tag=tag, timeout=60))
    same = await done(python.pty.connect(tag))
    assert same.pid == pty.pid
    screen = b""
    wanted = ["60 columns, 10 rows, é".encode(), "100 columns, 30 rows, é".encode()]
    async for data in items(pty.output()):
        screen += data
        if wanted and wanted[0] in screen:
            del wanted[0]
            if wanted:
                await done(same.resize(100, 30))
                await done(pty.send_input("x"))
            else:
                await done(pty.send_input("q"))
    assert not wanted, screen
    assert b"\x1b[?1049h" in screen  # it switched to the alternate screen
    assert (await done(pty.wait(timeout=LONG))).exit_code == 0
    assert (await done(pty.info()))["terminal"] is True


async def test_shell_in_a_terminal(python: Any) -> None:
    """Input arrives in order."""
    pty = await done(python.pty.start("bash", ["--norc"], cwd="/tmp", timeout=60))
    for text in ("a=6\r", "b=7\r", "echo $((a * b)) $(pwd)\r", "exit\r"):
        await done(pty.send_input(text))
    result = await done(pty.wait(timeout=LONG))
    assert "42 /tmp" in result.stdout
    assert (result.exit_code, result.lines[0]["stream"]) == (0, "terminal")


@both
async def test_files(api: Any, python: Any) -> None:
    directory = f"/tmp/files-{api.__name__}"
    files = python.files
    path = f"{directory}/sub/é & ?=%#+"
    info = await done(files.write(path, "é\r\n", mode=0o640, user="nobody"))
    assert (info["path"], info["mode"], info["user"], info["size"]) == (path, "0640", "nobody", 4)
    assert (await done(files.read(path)), await done(files.read(path, "bytes"))) == ("é\r\n", b"\xc3\xa9\r\n")
    odd = f"{directory}/sub/\udcff"  # a name that is not UTF-8
    data = os.urandom(1 << 20)
    await done(files.write(odd, data))
    assert await done(files.read(odd, format="bytes")) == data
    with pytest.raises(ConflictError, match="format='bytes'"):
        await done(files.read(odd))
    assert [entry["path"] for entry in await done(files.list(directory))] == [f"{directory}/sub"]
    entries = await done(files.list(Path(directory), depth=2))
    assert {entry["path"]: entry["type"] for entry in entries} == {
        f"{directory}/sub": "directory",
        path: "file",
        odd: "file",
    }
    assert (await done(files.mkdir(f"{directory}/a/b", mode="0700")))["mode"] == "0700"
    assert (await done(files.move(path, f"{directory}/c/d")))["size"] == 4
    assert [await done(files.exists(name)) for name in (path, f"{directory}/c/d")] == [False, True]
    await done(python.command.run("ln", ["-s", "c/d", f"{directory}/link"]))
    link = await done(files.stat(f"{directory}/link"))
    assert (link["type"], link["link_target"], link["target"]["size"]) == ("symlink", "c/d", 4)
    with pytest.raises(ConflictError):
        await done(files.remove(directory))
    await done(files.remove(directory, recursive=True))
    for call in (files.stat, files.read, files.list):
        with pytest.raises(SandboxNotFoundError):
            await done(call(directory))


async def test_watch(api: Any, python: Any) -> None:
    directory = f"/tmp/watch-{api.__name__}"
    await done(python.files.mkdir(f"{directory}/sub"))
    async with entered(python.files.watch(directory, recursive=True)) as stream:
        await done(python.files.write(f"{directory}/sub/é", "1"))
        await done(python.files.remove(f"{directory}/sub/é"))
        changes = []
        async for change in items(stream):
            changes.append(change)
            if change.type == "remove":
                break
    assert changes == [FileChange("create", "sub/é"), FileChange("remove", "sub/é")]
    with pytest.raises(SandboxNotFoundError):
        async with entered(python.files.watch(f"{directory}/nope")):
            pass


async def test_trees(api: Any, python: Any, tmp_path: Path) -> None:
    """A tree with links, modes and odd names is the same after an upload and a download."""
    remote = f"/tmp/tree-{api.__name__}"
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    make_tree(source)
    progress: list[int] = []
    await done(python.files.upload(source, remote, on_progress=progress.append))
    command = await done(python.command.run("sh", ["-c", f"sh {remote}/run.sh; stat -c %a {remote}/closed"]))
    assert command.stdout == "hello\n500"
    sent = progress[-1]
    await done(python.files.download(remote, target, on_progress=progress.append))
    assert described(target) == described(source)
    assert (target / "large").samefile(target / "sub" / "hard")
    assert (target / "run.sh").stat().st_mtime == 1e9
    assert sent > 1_000_000
    assert progress[-1] > 1_000_000
    # Links that lead out of the directory are not downloaded, and a download does not pass through existing ones.
    await done(python.command.run("sh", ["-c", f"ln -s /etc {remote}/etc; ln -s ../.. {remote}/sub/up"]))
    await done(python.files.download(remote, target))
    assert described(target) == described(source)
    (target / "sub" / "deep" / "up").unlink()
    (target / "sub" / "deep").rmdir()
    (target / "sub" / "deep").symlink_to(tmp_path)
    with pytest.raises(UnexpectedAnswerError, match="is a link"):
        await done(python.files.download(remote, target))
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


async def test_large_file(api: Any, python: Any, tmp_path: Path) -> None:
    local, copy = tmp_path / "local", tmp_path / "copy"
    local.write_bytes(os.urandom(3 << 20))
    local.chmod(0o750)
    remote = f"/tmp/large-{api.__name__}"
    await done(python.files.upload(local, remote))
    await done(python.files.download(remote, copy))
    assert copy.read_bytes() == local.read_bytes()
    assert copy.stat().st_mode & 0o777 == 0o750


async def test_contexts(api: Any, python: Any) -> None:
    first = await done(python.contexts.create(name=f"first-{api.__name__}", cwd="/tmp"))
    assert (first.language, first.cwd, first.busy, first.count) == ("python", "/tmp", False, 0)
    bash = await done(python.contexts.create("bash"))
    await done(python.run("x = 1", context=first))
    await done(python.run("x=2", context=bash.name))
    assert (await done(python.run("import os; os.getcwd(), x", context=first))).stdout == "('/tmp', 1)"
    assert (await done(python.run("echo $x", context=bash))).stdout == "2"
    names = {context.name: context.count for context in await done(python.contexts.list())}
    assert (names[first.name], names[bash.name]) == (2, 2)
    again = await done(python.contexts.restart(first))
    assert (again.name, again.pid != first.pid) == (first.name, True)
    assert (await done(python.run("x", context=first))).exception.name == "NameError"
    for context in (first, bash.name):
        await done(python.contexts.remove(context))
    with pytest.raises(SandboxNotFoundError):
        await done(python.run("x", context=first))


async def test_forward(api: Any, python: Any) -> None:
    directory = f"/tmp/www-{api.__name__}"
    data = os.urandom(500_000)
    await done(python.files.write(f"{directory}/data", data))
    port = 8001 if api.__name__ == "microsandbox" else 8002
    args = ["-u", "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", directory]
    web = await done(python.process.start("python3", args))
    async with entered(web.output()) as output:
        async for piece in items(output):
            if "Serving HTTP" in piece.text:
                break
    async with entered(python.forward(port)) as forward:
        url = f"http://127.0.0.1:{forward.local_port}/data"
        async with httpx.AsyncClient(trust_env=False, timeout=LONG) as client:
            for answer in await asyncio.gather(*(client.get(url) for _ in range(3))):
                assert (answer.status_code, answer.content) == (200, data)
            assert (await client.get(url + "/nope")).status_code == 404
    await done(web.kill())
    await done(web.wait(timeout=LONG))
    # Nothing listens on the port now, so the connection is closed.
    async with entered(python.forward(port)) as forward:
        reader, writer = await asyncio.open_connection(*forward.address)
        assert await asyncio.wait_for(reader.read(), LONG) == b""
        writer.close()


async def test_metrics(python: Any) -> None:
    metrics = await done(python.metrics.all())
    assert metrics["name"] == python.name
    assert metrics["namespace"] == "default"
    assert metrics["state"] == "running"
    assert metrics["running"] is True
    assert await done(python.metrics.is_running()) is True
    assert await done(python.metrics.cpu()) >= 0
    assert isinstance(await done(python.metrics.memory()), int)
    assert isinstance(await done(python.metrics.disk()), int)


async def test_info_and_list(api: Any, python: Any) -> None:
    info = await done(python.info())
    assert (info["name"], info["state"], info["image"]) == (python.name, "running", "microsandbox/python")
    assert (info["cpus"], info["memory"]) == (1, 512)
    listed = await done(api.list_sandboxes("*"))
    assert info in listed
    with pytest.raises(SandboxNotFoundError):
        await done(api.PythonSandbox(name="no-such-sandbox").info())


@both
async def test_bad_requests(api: Any, python: Any) -> None:
    with pytest.raises(ParseError):
        await done(python.run("\ud800"))
    with pytest.raises(InvalidRequestError, match="1048576 bytes"):
        await done(python.run("#" * (1 << 20)))
    with pytest.raises(InvalidParamsError, match="timeout -1"):
        await done(python.run("1", timeout=-1))
    with pytest.raises(InvalidParamsError, match="cpus"):
        await done(api.PythonSandbox.create(cpus=99))
    with pytest.raises(InvalidParamsError, match="volumes is not supported"):
        await done(api.PythonSandbox.create(volumes=["a:/a"]))
    with pytest.raises(ConflictError, match="memory"):
        await done(api.PythonSandbox.create(name=python.name, memory=300))
    with pytest.raises(InvalidParamsError, match="image"):
        await done(api.PythonSandbox.create(image="no/such"))


@pytest.mark.parametrize("key", ["none", "malformed", "unknown"])
async def test_wrong_keys(api: Any, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = os.environ["MSB_API_KEY"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MSB_API_KEY")
    middle = len(good) // 2
    api_key = {
        "none": None,
        "malformed": "msb_hello",
        "unknown": good[:middle] + ("A" if good[middle] != "A" else "B") + good[middle + 1 :],
    }[key]
    with pytest.raises(AuthenticationError) as caught:
        await done(api.PythonSandbox.create(api_key=api_key))
    assert (caught.value.code, caught.value.status) == (-32002, 401)
    assert caught.value.request_id
    assert ("No API key was sent" in str(caught.value)) == (key == "none")


async def test_key_in_a_dotenv_file(
    api: Any, python_name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, url = os.environ["MSB_API_KEY"], os.environ["MSB_SERVER_URL"]
    (tmp_path / ".env").write_text(f'MSB_API_KEY="{key}"\nMSB_SERVER_URL={url}\n')
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    monkeypatch.delenv("MSB_API_KEY")
    monkeypatch.delenv("MSB_SERVER_URL")
    sandbox = api.PythonSandbox(name=python_name)
    assert sandbox.server_url == url
    await done(sandbox.start())
    assert (await done(sandbox.run("6 * 7"))).stdout == "42"
    await done(sandbox.close())


async def test_no_server(api: Any) -> None:
    with pytest.raises(ServerUnreachableError, match="nothing listens"):
        await done(api.PythonSandbox.create(server_url="http://127.0.0.1:9"))


async def test_start_and_stop(api: Any) -> None:
    """The options take effect in the sandbox. After its stop, the sandbox does not exist."""
    options = {"memory": 512, "cpus": 1, "envs": {"GREETING": "hello"}, "workdir": "/tmp"}
    async with entered(api.PythonSandbox.create(**options)) as sandbox:
        code = "import os; print(os.environ['GREETING'], os.getcwd()); open('a', 'w').close()"
        execution = await done(sandbox.run(code))
        assert execution.stdout == "hello /tmp"
        same = api.PythonSandbox(name=sandbox.name)
        await done(same.start(**options))
        assert (await done(same.command.run("ls", ["/tmp/a"]))).success
    assert await done(same.metrics.is_running()) is False
    with pytest.raises(SandboxNotFoundError):
        await done(same.run("1"))
    with pytest.raises(SandboxNotFoundError):
        await done(same.stop())


async def test_several_at_once() -> None:
    async def use(number: int) -> str:
        async with PythonSandbox.create() as sandbox:
            await sandbox.run(f"n = {number}")
            runs = await asyncio.gather(*(sandbox.run("n += 1; n") for _ in range(3)))
            # Each run has its own connection, so their order varies.
            return " ".join(sorted(run.stdout for run in runs))

    assert sorted(await asyncio.gather(use(10), use(20))) == ["11 12 13", "21 22 23"]


async def began(sandbox: Any, name: str) -> None:
    """Wait until a run has created a file with this name."""
    script = f"until [ -e /tmp/{name} ]; do sleep 0.1; done"
    assert (await done(sandbox.command.run("sh", ["-c", script], timeout=LONG))).success


def endless(name: str) -> str:
    return f"open('/tmp/{name}', 'w').close()\nwhile True: pass"


async def test_cancel(python_name: str) -> None:
    """Canceling a call ends its run. Otherwise the next run would wait for it forever."""
    sandbox = PythonSandbox(name=python_name)
    await sandbox.start()
    await sandbox.run("kept = 2")
    run = asyncio.create_task(sandbox.run(endless("canceled")))
    await began(sandbox, "canceled")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (await asyncio.wait_for(sandbox.run("kept"), LONG)).stdout == "2"
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(sandbox.run("while True: pass"), 1)
    assert (await asyncio.wait_for(sandbox.run("kept"), LONG)).stdout == "2"
    await sandbox.close()


async def test_interrupt(python_name: str) -> None:
    """Ctrl-C in a blocking call ends the run."""
    program = (
        # The process that runs the tests may ignore SIGINT, and child processes inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from microsandbox.sync import PythonSandbox\n"
        f"sandbox = PythonSandbox(name={python_name!r})\n"
        "sandbox.start()\n"
        f"sandbox.run({endless('interrupted')!r})\n"
    )
    sandbox = PythonSandbox(name=python_name)
    await sandbox.start()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE)
    await began(sandbox, "interrupted")
    process.send_signal(signal.SIGINT)
    _, stderr = await asyncio.wait_for(process.communicate(), LONG)
    assert b"KeyboardInterrupt" in stderr
    assert (await asyncio.wait_for(sandbox.run("6 * 7"), LONG)).stdout == "42"
    await sandbox.close()
