"""Tests a server with the Python client of MCP, over HTTP and over stdio through the bridge "msb mcp"."""

import asyncio
import os

import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

URL = os.environ["MSB_SERVER_URL"] + "/mcp"
SANDBOX = os.environ["SANDBOX"]
TOOLS = [
    "sandbox_get",
    "sandbox_get_metrics",
    "sandbox_list",
    "sandbox_run_code",
    "sandbox_run_command",
    "sandbox_start",
    "sandbox_stop",
]
checks = 0


def check(got, want):
    global checks
    checks += 1
    assert got == want, f"got {got!r}, want {want!r}"


def http(key):
    client = httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=httpx2.Timeout(120))
    return streamable_http_client(URL, http_client=client)


def stdio(key):
    return StdioServerParameters(command=os.environ["MSB"], args=["mcp"], env={**os.environ, "MSB_API_KEY": key})


async def use(client):
    check(sorted(tool.name for tool in (await client.list_tools()).tools), TOOLS)
    check(sorted(prompt.name for prompt in (await client.list_prompts()).prompts), ["create_node_sandbox", "create_python_sandbox"])

    run = {"sandbox": SANDBOX, "language": "python"}
    text = 'naïve "ключ" 沙箱 🏖 \\ \u2028 end'
    result = await client.call_tool("sandbox_run_code", {**run, "code": f"x = {text!r}\nprint(x)"})
    check((result.is_error or False, result.content[0].text), (False, text))
    check(result.meta["io.github.msbd/result"], {"status": "success"})
    result = await client.call_tool("sandbox_run_code", {**run, "code": "len(x)"})  # the state is kept
    check(result.content[0].text, str(len(text)))
    result = await client.call_tool("sandbox_run_code", {**run, "code": "1/0"})
    check((result.meta["io.github.msbd/result"]["status"], "ZeroDivisionError" in result.content[0].text), ("error", True))
    result = await client.call_tool("sandbox_run_command", {"sandbox": SANDBOX, "command": "sh", "args": ["-c", "echo out; exit 3"]})
    check((result.content[0].text, result.meta["io.github.msbd/result"]["exit_code"]), ("out\n(exit code 3)", 3))
    result = await client.call_tool("sandbox_start", {"sandbox": SANDBOX, "config": {"image": "microsandbox/python"}})
    check(result.content[0].text, f"Sandbox {SANDBOX} started successfully")
    result = await client.call_tool("sandbox_get", {"sandbox": SANDBOX})
    check((result.structured_content["state"], result.structured_content["memory"]), ("running", 512))
    result = await client.call_tool("sandbox_list", {})
    check(SANDBOX in [sandbox["name"] for sandbox in result.structured_content["sandboxes"]], True)
    result = await client.call_tool("sandbox_get_metrics", {"sandbox": SANDBOX})
    check([sandbox["running"] for sandbox in result.structured_content["sandboxes"]], [True])

    result = await client.call_tool("sandbox_stop", {"sandbox": "none-such"})
    check((result.is_error, result.meta["io.github.msbd/error"]["code"]), (True, -32003))
    result = await client.call_tool("sandbox_stop", {"sandbox": SANDBOX, "extra": 1})
    check((result.is_error, "params.extra" in result.content[0].text), (True, True))
    try:
        await client.call_tool("no_such_tool", {})
        assert False, "an unknown tool was called without an error"
    except MCPError as err:
        check("unknown tool" in str(err), True)

    progress = []

    async def on_progress(value, total, message):
        progress.append(value)

    result = await client.call_tool("sandbox_run_code", {**run, "code": "import time"}, progress_callback=on_progress)
    check((result.content[0].text, len(progress) >= 1), ("(no output)", True))

    # Canceling a call interrupts its run. Otherwise the next run would wait for it until after the timeout.
    call = asyncio.create_task(client.call_tool("sandbox_run_code", {**run, "code": "open('/tmp/began', 'w').close(); time.sleep(600)"}))
    began = {"sandbox": SANDBOX, "command": "rm", "args": ["/tmp/began"]}
    while not (await client.call_tool("sandbox_run_command", began)).meta["io.github.msbd/result"]["success"]:
        pass
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    result = await asyncio.wait_for(client.call_tool("sandbox_run_code", {**run, "code": "2+2"}), timeout=120)
    check(result.content[0].text, "4")


async def main():
    key = os.environ["MSB_API_KEY"]
    for mode, revision in [("auto", "2026-07-28"), ("legacy", "2025-11-25")]:
        for transport in [http(key), stdio(key)]:
            async with Client(transport, mode=mode) as client:
                check(client.session.protocol_version, revision)
                await use(client)
        async with Client(http(os.environ["LIMITED_KEY"]), mode=mode) as client:
            result = await client.call_tool("sandbox_stop", {"sandbox": SANDBOX, "namespace": "default"})
            check((result.is_error, result.meta["io.github.msbd/error"]["code"]), (True, -32004))
        for transport in [http(""), http("msb_wrong"), stdio("msb_wrong")]:
            try:
                async with Client(transport, mode=mode) as client:
                    await client.list_tools()
            except BaseException:
                check(True, True)
            else:
                assert False, "a connection with a wrong key was accepted"
    print(f"mcp (Python): {checks} checks")


asyncio.run(main())
