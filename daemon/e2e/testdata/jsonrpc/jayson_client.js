// Drives a server with jayson.
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

// jayson gives a failed HTTP status as an error that has the body.
async function refused(client, status, code, method, params) {
  const err = await client.request(method, params, "an id").then((answer) => assert.fail(JSON.stringify(answer)), (err) => err);
  const answer = JSON.parse(err.message);
  check([err.code, answer.jsonrpc, answer.error?.code, "result" in answer], [status, "2.0", code, false]);
  check(answer.id, status === 401 ? null : "an id"); // without a key nothing of the body is read
}

async function main() {
  const text = 'naïve "ключ" 沙箱 🏖 \\ \u2028 end';
  let answer = await client.request("sandbox.repl.run", { sandbox, language: "python", code: `print(${JSON.stringify(text)})` });
  check(answer.result.output, [{ stream: "stdout", text }]);
  answer = await client.request("sandbox.command.run", [sandbox, "default", "echo", [text]]);
  check([answer.result.exit_code, answer.result.output], [0, [{ stream: "stdout", text }]]);

  for (const id of [0, -1, Number.MAX_SAFE_INTEGER, "", "1", '7b\u0000é🏖"\\']) {
    answer = await client.request("sandbox.metrics.get", {}, id);
    check([answer.jsonrpc, answer.id, "error" in answer, Array.isArray(answer.result.sandboxes)], ["2.0", id, false, true]);
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
  const answers = await client.request(batch);
  const ids = batch.filter((request) => "id" in request).map((request) => request.id);
  check(answers.map((a) => a.id), ids);
  check(answers.map((a) => a.error?.code), [undefined, -32601, undefined]);

  check(await client.request("rpc.discover", {}, null), undefined);
  check(await client.request([client.request("rpc.discover", {}, null, false), client.request("sandbox.explode", {}, null, false)]), undefined);
  console.log(`jayson: ${checks} checks`);
}

main().catch((err) => {
  console.error(err);
  process.exit(1);
});
