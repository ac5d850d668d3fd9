"""Tests of the package with a real server and real sandboxes, with asyncio and blocking."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from microsandbox import (
    AuthenticationError,
    CommandNotFoundError,
    ConflictError,
    InvalidParamsError,
    InvalidRequestError,
    ParseError,
    PythonSandbox,
    RunTimeoutError,
    SandboxNotFoundError,
    ServerUnreachableError,
)

from ..flavours import done, entered

pytestmark = pytest.mark.anyio

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
    options = {"memory": 400, "cpus": 1, "envs": {"GREETING": "hello"}, "workdir": "/tmp"}
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
