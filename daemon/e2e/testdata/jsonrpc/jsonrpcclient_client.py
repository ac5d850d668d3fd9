"""Tests a server with jsonrpcclient and with the examples of the JSON-RPC 2.0 specification."""

import json
import os

import httpx
import jsonrpcclient
from jsonrpcclient import Error, Ok

client = httpx.Client(base_url=os.environ["MSB_SERVER_URL"], headers={"Authorization": "Bearer " + os.environ["MSB_API_KEY"]}, timeout=60)
checks = 0


def check(got, want):
    global checks
    checks += 1
    assert got == want, f"got {got!r}, want {want!r}"


def send(body):
    return client.post("/api/v1/rpc", content=body if isinstance(body, (str, bytes)) else json.dumps(body), headers={"Content-Type": "application/json"})


def parse(response):
    check(response.headers["Content-Type"], "application/json")
    # The specification requires "2.0", an id, and exactly one of result and error.
    for item in response.json() if isinstance(response.json(), list) else [response.json()]:
        check((item["jsonrpc"], "id" in item, len({"result", "error"} & item.keys()), len(item)), ("2.0", True, 1, 3))
    parsed = jsonrpcclient.parse(response.json())
    return parsed if isinstance(parsed, (Ok, Error)) else list(parsed)


def failed(response, status, code, id=None):
    error = parse(response)
    check((response.status_code, error.code, error.id, bool(error.message)), (status, code, id, True))


# Requests of the library, with each of its kinds of ids.
for new_request in [jsonrpcclient.request, jsonrpcclient.request_hex, jsonrpcclient.request_random, jsonrpcclient.request_uuid]:
    request = new_request("sandbox.metrics.get", params={"namespace": "*"})
    result = parse(send(request))
    check((type(result), result.id, sorted(result.result)), (Ok, request["id"], ["sandboxes"]))
check(type(parse(send(jsonrpcclient.request_json("sandbox.metrics.get", params=(None, "default"))))), Ok)
failed(send(jsonrpcclient.request("sandbox.explode", id=5)), 404, -32601, 5)
response = send(jsonrpcclient.notification("rpc.discover"))
check((response.status_code, response.content), (204, b""))

# The examples of the specification, adapted to the methods of this server.
ping, stop = {"jsonrpc": "2.0", "method": "sandbox.metrics.get"}, {"jsonrpc": "2.0", "method": "sandbox.stop"}
check(parse(send({**ping, "params": {"namespace": "default", "sandbox": "none"}, "id": 3})).id, 3)
failed(send({"jsonrpc": "2.0", "method": "foobar", "id": "1"}), 404, -32601, "1")
failed(send('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]'), 400, -32700)
failed(send({"jsonrpc": "2.0", "method": 1, "params": "bar"}), 400, -32600)
failed(send('[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method"]'), 400, -32700)
failed(send([]), 400, -32600)
check([(error.code, error.id) for error in parse(send([1]))], [(-32600, None)])
check([(error.code, error.id) for error in parse(send([1, 2, 3]))], [(-32600, None)] * 3)
mixed = parse(send([
    {**ping, "id": "1"}, {"jsonrpc": "2.0", "method": "rpc.discover"}, {**stop, "params": ["none"], "id": "2"}, {"foo": "boo"},
    {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"}, {**ping, "id": "9"},
]))
check([(result.id, getattr(result, "code", 0)) for result in mixed], [("1", 0), ("2", -32003), (None, -32600), ("5", -32601), ("9", 0)])
response = send([{"jsonrpc": "2.0", "method": "rpc.discover"}, {"jsonrpc": "2.0", "method": "foobar"}])
check((response.status_code, response.content), (204, b""))

# Rules of the specification that have no example.
for version in ["1.0", 2.0, None]:
    failed(send({**ping, "jsonrpc": version, "id": 1}), 400, -32600, 1)
failed(send({"method": "sandbox.metrics.get", "id": 1}), 400, -32600, 1)
for params in ["bar", 1, True]:
    failed(send({**ping, "params": params, "id": 1}), 400, -32600, 1)
for id in [[], {}, True]:
    failed(send({**ping, "id": id}), 400, -32600)
check([result.id for result in parse(send([{**ping, "id": 1}] * 2))], [1, 1])
check(b'"id":1.50' in send('{"jsonrpc": "2.0", "method": "sandbox.metrics.get", "id": 1.50}').content, True)
check(b'"id":9007199254740993' in send({**ping, "id": 2**53 + 1}).content, True)
failed(send(b'{"jsonrpc": "2.0", "method": "\xff", "id": 1}'), 400, -32700)

print(f"jsonrpcclient: {checks} checks")
