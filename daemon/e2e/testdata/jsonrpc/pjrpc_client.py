"""Tests a server with pjrpc, which checks that each response complies with the specification."""

import os

import httpx
import pjrpc
from pjrpc.client.backend.httpx import Client

URL = os.environ["MSB_SERVER_URL"] + "/api/v1/rpc"
SANDBOX = os.environ["SANDBOX"]
checks = 0


def check(got, want):
    global checks
    checks += 1
    assert got == want, f"got {got!r}, want {want!r}"


class Transport(httpx.HTTPTransport):
    """Stores the status and body of the last response."""

    def handle_request(self, request):
        response = super().handle_request(request)
        response.read()
        self.status, self.body = response.status_code, response.content
        return response


def connect(key):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = Transport()
    # The server answers errors with an HTTP error status and a JSON-RPC response in the body.
    return Client(URL, http_client=httpx.Client(headers=headers, transport=transport, timeout=60), raise_for_status=False), transport


def refused(client, transport, status, code, method, *args, **kwargs):
    try:
        result = client.call(method, *args, **kwargs)
    except pjrpc.client.exceptions.JsonRpcError as err:
        check((transport.status, err.code), (status, code))
        return err
    raise AssertionError(f"{method} returned {result!r}, want error {code}")


client, transport = connect(os.environ["MSB_API_KEY"])

# Calls with named params, with positional params, and through the proxy.
text = 'naïve "ключ" 沙箱 🏖 \\ \u2028 \x7f end'
result = client.call("sandbox.repl.run", sandbox=SANDBOX, language="python", code=f"print({text!r})")
check(result["output"], [{"stream": "stdout", "text": text}])
check(client.call("sandbox.command.run", SANDBOX, "default", "echo", [text])["output"], [{"stream": "stdout", "text": text}])
check(client.proxy.__getattr__("rpc.discover")()["openrpc"].split(".")[0], "1")
check(transport.status, 200)

# The server returns ids of any size and type unchanged.
for id in [0, -1, 2**53 + 1, 10**40, "", "1", "7b\u0000é\U0001f3d6\"\\", "x" * 1000]:
    response = client.send(pjrpc.Request("sandbox.metrics.get", id=id))
    check((response.id, type(response.id), response.is_success), (id, type(id), True))

# Errors.
refused(client, transport, 404, -32601, "sandbox.explode")
refused(client, transport, 404, -32601, "rpc.nothing")
refused(client, transport, 400, -32602, "sandbox.start")
refused(client, transport, 400, -32602, "sandbox.start", sandbox="../etc")
refused(client, transport, 400, -32602, "sandbox.start", sandbox=7)
refused(client, transport, 400, -32602, "sandbox.start", sandbox="x", color="red")
refused(client, transport, 400, -32602, "sandbox.start", *range(20))
refused(client, transport, 404, -32003, "sandbox.stop", sandbox="not-there")
refused(client, transport, 409, -32005, "sandbox.start", sandbox=SANDBOX, config={"memory": 300})
refused(client, transport, 504, -32007, "sandbox.command.run", sandbox=SANDBOX, command="sleep", args=["60"], timeout=1)
refused(client, transport, 422, -32008, "sandbox.command.run", sandbox=SANDBOX, command="no-such-program")
for key in ["", "msb_v2.public.nonsense"]:
    refused(*connect(key), 401, -32002, "sandbox.metrics.get")
refused(*connect(os.environ["LIMITED_KEY"]), 403, -32004, "sandbox.metrics.get", namespace="default")

# A batch gets a single response. pjrpc checks that its ids are exactly those of the requests.
with client.batch() as batch:
    batch("sandbox.metrics.get")
    batch.notify("sandbox.metrics.get")
    batch("sandbox.explode")
    batch("sandbox.command.run", sandbox=SANDBOX, command="true")
    batch("sandbox.stop", "not-there")
check(transport.status, 200)
responses = {response.id: response for response in batch.get_response()}
check([response.is_success for _, response in sorted(responses.items())], [True, False, True, False])
check([response.error.code for _, response in sorted(responses.items()) if response.is_error], [-32601, -32003])

# Notifications get no response.
client.notify("rpc.discover")
check((transport.status, transport.body), (204, b""))
with client.batch() as batch:
    batch.notify("rpc.discover")
    batch.notify("sandbox.explode")
check((transport.status, transport.body, batch.get_response()), (204, b"", None))

print(f"pjrpc: {checks} checks")
