"""A program for microsandbox 0.1.8 from PyPI. It uses nothing that later versions added.

It runs against a real server, with that package and with this repository's package:

    MSB_SERVER_URL=… MSB_API_KEY=… python program.py

Its exit code is 0 if every case passes. Otherwise it prints a traceback and exits with 1.
The virtual environment's directory must be writable: the program creates a temporary .env file there, because
version 0.1.8 looks for .env in the directories above the package.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import sys
import time
import uuid

import aiohttp

from microsandbox import (
    BaseSandbox,
    Command,
    CommandExecution,
    Execution,
    Metrics,
    NodeSandbox,
    PythonSandbox,
)

RUN = uuid.uuid4().hex[:8]
NAMESPACE = "original"


@contextlib.contextmanager
def raises(text=""):
    """Check that a block raises RuntimeError, the only exception of version 0.1.8."""
    try:
        yield
    except RuntimeError as error:
        assert text.lower() in str(error).lower(), f"{error!r} does not contain {text!r}"
    else:
        raise AssertionError("nothing was raised")


@contextlib.contextmanager
def environment(**variables):
    """Set environment variables, or remove those that are None. Restores the environment at the end."""
    before = dict(os.environ)
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.asynccontextmanager
async def attached(**options):
    """Use a running sandbox without create(), as programs do that keep a sandbox running."""
    sandbox = PythonSandbox(name=f"python-{RUN}", **options)
    sandbox._session = aiohttp.ClientSession()
    try:
        await sandbox.start()
        yield sandbox
    finally:
        await sandbox._session.close()


async def answers(**options):
    async with attached(**options) as sandbox:
        execution = await sandbox.run("print(6 * 7)")
        assert await execution.output() == "42"


async def types(python, node, team):
    for sandbox in (python, node, team):
        assert isinstance(sandbox, BaseSandbox)
        assert isinstance(sandbox.command, Command)
        assert isinstance(sandbox.metrics, Metrics)
    assert await python.get_default_image() == "microsandbox/python"
    assert await node.get_default_image() == "microsandbox/node"


async def python_runs(python, node, team):
    execution = await python.run("print('hello')\nprint('é 😀')")
    assert isinstance(execution, Execution)
    assert await execution.output() == "hello\né 😀"
    assert await execution.error() == ""
    assert execution.has_error() is False
    assert execution.status == "success"
    assert execution.language == "python"


async def python_keeps_state(python, node, team):
    await python.run("import math\nx = 6")
    await python.run("def f(n):\n    return n * math.floor(7.5)")
    assert await (await python.run("f(x)")).output() == "42"
    assert await (await python.run("print(x, end='')")).output() == "6"


async def python_errors(python, node, team):
    execution = await python.run("print('before')\nraise ValueError('no')")
    assert execution.has_error() is True
    assert execution.status == "error"
    assert await execution.output() == "before"
    assert "ValueError: no" in await execution.error()
    execution = await python.run("def f(:")
    assert execution.has_error()
    assert "SyntaxError" in await execution.error()
    execution = await python.run("import sys\nprint('careful', file=sys.stderr)")
    assert execution.has_error() is True  # any output on stderr counts as an error
    assert execution.status == "success"
    assert await (await python.run("x")).output() == "6"


async def node_runs(python, node, team):
    execution = await node.run("console.log('hello'); console.log('é 😀')")
    assert isinstance(execution, Execution)
    assert await execution.output() == "hello\né 😀"
    assert execution.language == "nodejs"
    assert execution.has_error() is False


async def node_keeps_state(python, node, team):
    await node.run("let x = 6; function f(n) { return n * 7 }")
    assert await (await node.run("console.log(f(x))")).output() == "42"


async def node_errors(python, node, team):
    execution = await node.run("console.log('before'); throw new TypeError('no')")
    assert execution.has_error() is True
    assert execution.status == "error"
    assert await execution.output() == "before"
    assert "TypeError: no" in await execution.error()
    assert await (await node.run("console.log(x)")).output() == "6"


async def commands(python, node, team):
    command = await python.command.run("echo", ["Hello", "World"])
    assert isinstance(command, CommandExecution)
    assert await command.output() == "Hello World"
    assert await command.error() == ""
    assert (command.exit_code, command.success) == (0, True)
    assert (command.command, command.args) == ("echo", ["Hello", "World"])
    command = await python.command.run("pwd")
    assert (command.args, command.success) == ([], True)
    command = await node.command.run("sh", ["-c", "echo out; echo err >&2; exit 3"], timeout=60)
    assert (command.exit_code, command.success) == (3, False)
    assert await command.output() == "out"
    assert await command.error() == "err"
    command = await python.command.run("ls", ["/nonexistent"])
    assert not command.success
    assert "nonexistent" in await command.error()
    with raises("not found"):
        await python.command.run("no-such-program")


async def files_belong_to_one_sandbox(python, node, team):
    await python.run("open('/tmp/a', 'w').write('from code')")
    assert await (await python.command.run("cat", ["/tmp/a"])).output() == "from code"
    assert not (await team.command.run("cat", ["/tmp/a"])).success


async def timeouts(python, node, team):
    began = time.monotonic()
    with raises("time limit"):
        await python.command.run("sleep", ["600"], timeout=1)
    assert time.monotonic() - began < 300
    assert await (await python.run("x")).output() == "6"


async def metrics(python, node, team):
    everything = await team.metrics.all()
    assert isinstance(everything, dict)
    assert everything["name"] == f"team-{RUN}"
    assert everything["namespace"] == NAMESPACE
    assert await team.metrics.is_running() is True
    assert isinstance(await team.metrics.cpu(), (int, float))
    assert isinstance(await team.metrics.memory(), int)
    assert isinstance(await team.metrics.disk(), int)


async def runs_at_once(python, node, team):
    async def use(sandbox, print_):
        runs = await asyncio.gather(*(sandbox.run(print_.format(i)) for i in range(5)))
        assert [await run.output() for run in runs] == [str(i) for i in range(5)]

    await asyncio.gather(
        use(python, "print({})"),
        use(node, "console.log({})"),
        use(team, "print({})"),
        *(sandbox.command.run("sleep", ["0.2"]) for sandbox in (python, node, team)),
    )


async def key_from_the_environment(python, node, team):
    await answers()


async def key_as_an_argument(python, node, team):
    key, url = os.environ["MSB_API_KEY"], os.environ["MSB_SERVER_URL"]
    with environment(MSB_API_KEY="msb_another", MSB_SERVER_URL="http://127.0.0.1:9"):
        await answers(api_key=key, server_url=url, namespace="default")


async def key_in_a_dotenv_file(python, node, team):
    key, url = os.environ["MSB_API_KEY"], os.environ["MSB_SERVER_URL"]
    path = os.path.join(sys.prefix, ".env")
    with open(path, "x") as file:
        os.chmod(path, 0o600)
        file.write(f'MSB_API_KEY="{key}"\nMSB_SERVER_URL={url}\n')
    try:
        with environment(MSB_API_KEY=None, MSB_SERVER_URL=None):
            await answers()
    finally:
        os.remove(path)


async def wrong_keys(python, node, team):
    good = os.environ["MSB_API_KEY"]
    middle = len(good) // 2
    for bad in (
        "msb_hello",
        good[:-1],
        good[:middle] + ("A" if good[middle] != "A" else "B") + good[middle + 1 :],
    ):
        with raises("invalid API key"):
            async with PythonSandbox.create(name=f"wrong-{RUN}", api_key=bad):
                raise AssertionError("a wrong key was accepted")
    with environment(MSB_API_KEY=None), raises("invalid API key"):
        async with PythonSandbox.create(name=f"wrong-{RUN}"):
            raise AssertionError("a call without a key was accepted")


async def no_server(python, node, team):
    with raises():
        async with PythonSandbox.create(server_url="http://127.0.0.1:9"):
            raise AssertionError("a sandbox started without a server")


async def bad_starts(python, node, team):
    with raises("name"):
        async with PythonSandbox.create(name="../up"):
            raise AssertionError("an invalid name was accepted")
    sandbox = PythonSandbox(name=f"python-{RUN}")
    sandbox._session = aiohttp.ClientSession()
    with raises("another configuration"):
        await sandbox.start(memory=1024, cpus=2.0)
    with raises("no/such"):
        await PythonSandbox.start(sandbox, image="no/such")
    await sandbox._session.close()


async def not_started(python, node, team):
    sandbox = PythonSandbox(name=f"python-{RUN}")
    for call in (lambda: sandbox.run("1"), lambda: sandbox.command.run("true"), lambda: sandbox.metrics.all()):
        with raises("not started"):
            await call()
    await sandbox.stop()  # does nothing


class Subclass(BaseSandbox):
    """A sandbox that sends its own requests, with the attributes of the base class."""

    async def get_default_image(self):
        return "microsandbox/python"

    async def run(self, code):
        params = {"sandbox": self._name, "namespace": self._namespace, "language": "python", "code": code}
        async with self._session.post(
            f"{self._server_url}/api/v1/rpc",
            json={"jsonrpc": "2.0", "method": "sandbox.repl.run", "params": params, "id": "1"},
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._api_key}"},
        ) as response:
            return Execution(output_data=(await response.json())["result"])


async def subclass(python, node, team):
    sandbox = Subclass(name=f"python-{RUN}")
    sandbox._session = aiohttp.ClientSession()
    await sandbox.start()
    assert await (await sandbox.run("print(6 * 7)")).output() == "42"
    assert (await sandbox.command.run("true")).success
    await sandbox._session.close()


CASES = [
    types,
    python_runs,
    python_keeps_state,
    python_errors,
    node_runs,
    node_keeps_state,
    node_errors,
    commands,
    files_belong_to_one_sandbox,
    timeouts,
    metrics,
    runs_at_once,
    key_from_the_environment,
    key_as_an_argument,
    key_in_a_dotenv_file,
    wrong_keys,
    no_server,
    bad_starts,
    not_started,
    subclass,
]


async def stops(sandbox, creation):
    """Check that a stopped sandbox and its data are gone, and that its name can be used again."""
    await creation.__aexit__(None, None, None)
    with raises("not started"):
        await sandbox.run("1")
    again = PythonSandbox(name=f"team-{RUN}", namespace=NAMESPACE)
    again._session = aiohttp.ClientSession()
    await again.start(image="microsandbox/python", memory=512, cpus=1.0, timeout=120.0)
    assert (await again.run("n")).has_error()
    await again.stop()
    await again.stop()
    with raises("not started"):
        await again.metrics.is_running()
    await again._session.close()


async def main():
    began = time.monotonic()

    def passed(case):
        print(f"{time.monotonic() - began:5.1f} s  {case}", flush=True)

    print("microsandbox", importlib.metadata.version("microsandbox"), flush=True)
    creations = [
        PythonSandbox.create(name=f"python-{RUN}"),
        NodeSandbox.create(name=f"node-{RUN}"),
        PythonSandbox.create(name=f"team-{RUN}", namespace=NAMESPACE),
    ]
    entered = []
    try:
        sandboxes = await asyncio.gather(*(creation.__aenter__() for creation in creations), return_exceptions=True)
        for creation, sandbox in zip(creations, sandboxes):
            if isinstance(sandbox, BaseException):
                raise sandbox
            entered.append(creation)
        passed("several start at once")
        await sandboxes[2].run("n = 1")
        for case in CASES:
            try:
                await case(*sandboxes)
            except BaseException:
                print("failed:", case.__name__, flush=True)
                raise
            passed(case.__name__)
        await stops(sandboxes[2], entered.pop())
        passed("stops")
    finally:
        await asyncio.gather(*(creation.__aexit__(None, None, None) for creation in entered))
    passed("all")


asyncio.run(main())
