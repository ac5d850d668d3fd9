// Tests a server with the JSON-RPC client jayson.
"use strict";

const assert = require("node:assert/strict");
const jayson = require("jayson/promise");

const { hostname, port } = new URL(process.env.MSB_SERVER_URL);
const sandbox = process.env.SANDBOX;
let checks = 0;

function check(got, want) {
  checks++;
  assert.deepEqual(got, want);
}

function connect(key) {
  return jayson.Client.http({ host: hostname, port, path: "/api/v1/rpc", headers: key ? { Authorization: `Bearer ${key}` } : {} });
}

const client = connect(process.env.MSB_API_KEY);

// refused checks that a request fails. jayson turns an HTTP error status into an error that contains the body.
async function refused(client, status, code, method, params) {
  const err = await client.request(method, params, "an id").then((response) => assert.fail(JSON.stringify(response)), (err) => err);
  const response = JSON.parse(err.message);
  check([err.code, response.jsonrpc, response.error?.code, "result" in response], [status, "2.0", code, false]);
  check(response.id, status === 401 ? null : "an id"); // without a valid key, the server does not read the body
}

async function main() {
  const text = 'naïve "ключ" 沙箱 🏖 \\ \u2028 end';
  let response = await client.request("sandbox.repl.run", { sandbox, language: "python", code: `print(${JSON.stringify(text)})` });
  check(response.result.output, [{ stream: "stdout", text }]);
  response = await client.request("sandbox.command.run", [sandbox, "default", "echo", [text]]);
  check([response.result.exit_code, response.result.output], [0, [{ stream: "stdout", text }]]);

  for (const id of [0, -1, Number.MAX_SAFE_INTEGER, "", "1", '7b\u0000é🏖"\\']) {
    response = await client.request("sandbox.metrics.get", {}, id);
    check([response.jsonrpc, response.id, "error" in response, Array.isArray(response.result.sandboxes)], ["2.0", id, false, true]);
  }

  await refused(client, 404, -32601, "sandbox.explode", {});
  await refused(client, 400, -32602, "sandbox.start", {});
  await refused(client, 400, -32602, "sandbox.start", ["../etc"]);
  await refused(client, 404, -32003, "sandbox.stop", { sandbox: "not-there" });
  await refused(client, 409, -32005, "sandbox.start", { sandbox, config: { memory: 300 } });
  await refused(client, 422, -32008, "sandbox.command.run", { sandbox, command: "no-such-program" });
  await refused(connect(""), 401, -32002, "sandbox.metrics.get", {});
  await refused(connect("msb_v2.public.nonsense"), 401, -32002, "sandbox.metrics.get", {});
  await refused(connect(process.env.LIMITED_KEY), 403, -32004, "sandbox.metrics.get", { namespace: "default" });

  const batch = [
    client.request("sandbox.metrics.get", {}, undefined, false),
    client.request("sandbox.metrics.get", {}, null, false), // a notification
    client.request("sandbox.explode", {}, undefined, false),
    client.request("sandbox.command.run", { sandbox, command: "true" }, undefined, false),
  ];
  const responses = await client.request(batch);
  const ids = batch.filter((request) => "id" in request).map((request) => request.id);
  check(responses.map((r) => r.id), ids);
  check(responses.map((r) => r.error?.code), [undefined, -32601, undefined]);

  check(await client.request("rpc.discover", {}, null), undefined);
  check(await client.request([client.request("rpc.discover", {}, null, false), client.request("sandbox.explode", {}, null, false)]), undefined);
  console.log(`jayson: ${checks} checks`);
}

main().catch((err) => {
  console.error(err);
  process.exit(1);
});
