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
    "sandbox_get_process_output",
    "sandbox_list",
    "sandbox_list_files",
    "sandbox_list_processes",
    "sandbox_read_file",
    "sandbox_remove_file",
    "sandbox_run_code",
    "sandbox_run_command",
    "sandbox_send_process_input",
    "sandbox_start",
    "sandbox_start_process",
    "sandbox_stop",
    "sandbox_stop_process",
    "sandbox_write_file",
]
# An image of one pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
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

    # Files
    path = "/tmp/mcp/naïve file.txt"
    file = {"sandbox": SANDBOX, "path": path}
    result = await client.call_tool("sandbox_write_file", {**file, "content": text})
    check(result.structured_content["path"], path)
    result = await client.call_tool("sandbox_read_file", file)
    check(result.content[0].text, text)
    result = await client.call_tool("sandbox_list_files", {"sandbox": SANDBOX, "path": "/tmp/mcp"})
    check(result.content[0].text, f"{path} ({len(text.encode())} bytes)")
    result = await client.call_tool("sandbox_remove_file", {"sandbox": SANDBOX, "path": "/tmp/mcp", "recursive": True})
    check(result.is_error or False, False)
    result = await client.call_tool("sandbox_read_file", file)
    check((result.is_error, result.meta["io.github.msbd/error"]["code"]), (True, -32003))

    # A background process
    shell = ["-c", "echo ready; while read line; do echo got $line; done"]
    start = {"sandbox": SANDBOX, "command": "sh", "args": shell, "open_stdin": True}
    result = await client.call_tool("sandbox_start_process", start)
    process = {"sandbox": SANDBOX, "pid": result.structured_content["pid"]}
    offset, output = 0, ""

    async def poll(until):
        nonlocal offset, output
        while until not in output:
            got = await client.call_tool("sandbox_get_process_output", {**process, "offset": offset, "wait": 1})
            state = got.meta["io.github.msbd/result"]
            if state["next_offset"] > offset:
                output += got.content[0].text
            offset = state["next_offset"]
            check(state["running"], True)

    await poll("ready\n")
    await client.call_tool("sandbox_send_process_input", {**process, "data": "input\n"})
    await poll("got input\n")
    check(output, "ready\ngot input\n")
    result = await client.call_tool("sandbox_list_processes", {"sandbox": SANDBOX})
    check(f"pid {process['pid']}, running, {offset} bytes of output: sh -c echo ready" in result.content[0].text, True)
    result = await client.call_tool("sandbox_stop_process", process)
    check(result.content[0].text, "(exit code 143)")
    result = await client.call_tool("sandbox_get_process_output", {**process, "offset": 0})
    check([content.text for content in result.content], [output, "(exit code 143)"])

    # A figure
    code = f"import base64\nclass Dot:\n  def _repr_png_(self): return base64.b64decode({PNG!r})\n"
    code += "print('a dot')\nDot()"
    result = await client.call_tool("sandbox_run_code", {**run, "code": code})
    check([content.type for content in result.content], ["text", "image"])
    value, image = result.content
    check((value.text.split("\n")[0], image.mime_type, image.data), ("a dot", "image/png", PNG))

    # A long output, and the link to all of it
    result = await client.call_tool("sandbox_run_command", {"sandbox": SANDBOX, "command": "seq", "args": ["50000"]})
    check([content.type for content in result.content], ["text", "resource_link"])
    shown, link = result.content
    check((shown.text[:4], shown.text[-6:], len(shown.text) < 51_000), ("1\n2\n", "\n50000", True))
    contents = (await client.read_resource(link.uri)).contents
    complete = "".join(f"{i}\n" for i in range(1, 50001))
    check((len(contents), contents[0].text, link.size), (1, complete, len(complete)))
    contents = (await client.read_resource(f"{link.uri}?offset=2&length=4")).contents
    check(contents[0].text, "2\n3\n")
    name = str(link.uri).split("/files")[1]
    result = await client.call_tool("sandbox_read_file", {"sandbox": SANDBOX, "path": name, "offset": 4, "length": 4})
    check(result.content[0].text, "3\n4\n")
    templates = (await client.list_resource_templates()).resource_templates
    template = "msb://sandboxes/{namespace}/{sandbox}/files{+path}{?offset,length}"
    check([listed.uri_template for listed in templates], [template])

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
            try:
                await client.read_resource(f"msb://sandboxes/default/{SANDBOX}/files/etc/hostname")
                assert False, "a file of another namespace was read"
            except MCPError as err:
                check("project-web" in str(err), True)
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
