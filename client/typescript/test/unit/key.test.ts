import { format, inspect } from "node:util";
import { serialize } from "node:v8";
import { expect, test } from "vitest";
import { PythonSandbox, SandboxOptions } from "../../src/index.js";
import { drop, errorReply, Stub, testKey, unused } from "../stub.js";

/** Returns a value in all the ways in which programs print and log values. */
function shown(value: unknown): string {
  const texts = [
    String(value),
    `${JSON.stringify(value)}`,
    inspect(value, { depth: null, showHidden: true, getters: true }),
    // Without getters, because calling the getter apiKey returns the key on purpose.
    inspect(value, { depth: null, showHidden: true, customInspect: false }),
    format("%s %o %O %j", value, value, value, value),
    JSON.stringify(Object.entries(value as object)),
    serialize({ ...(value as object) }).toString("latin1"),
  ];
  return texts.join("\n");
}

test("printing a sandbox does not show the key", async () => {
  await using stub = await Stub.start();
  const sandbox = await PythonSandbox.create({ ...stub.access, name: "my-env" });
  for (const value of [sandbox, sandbox.command, sandbox.metrics, { sandbox }]) {
    expect(shown(value)).not.toContain("canary");
  }
  expect(shown(SandboxOptions.builder().apiKey(testKey))).not.toContain("canary");
  expect(inspect(sandbox)).toBe(
    `PythonSandbox {\n  name: 'my-env',\n  namespace: undefined,\n  serverUrl: '${stub.url}',\n  isStarted: true\n}`,
  );
  expect(JSON.parse(JSON.stringify(sandbox))).toEqual({ name: "my-env", serverUrl: stub.url, isStarted: true });
  expect(sandbox.apiKey).toBe(testKey); // this getter returns the key on purpose
});

test("no error contains the key", async () => {
  await using stub = await Stub.start();
  const sandbox = await PythonSandbox.create(stub.access);
  const errors: unknown[] = [];
  const run = () => sandbox.run("1").catch((error: unknown) => errors.push(error));
  stub.answer("sandbox.repl.run", errorReply(401, -32002), errorReply(500, -32603), drop, (request) =>
    request.socket.end("nonsense\r\n\r\n"),
  );
  for (let i = 0; i < 4; i++) await run();
  for (const options of [{ serverUrl: unused }, { serverUrl: "http://a.invalid" }, { timeout: -1 }]) {
    await PythonSandbox.create({ ...stub.access, ...options }).catch((error) => errors.push(error));
  }
  expect(errors.map((error) => (error as Error).name)).toEqual([
    "AuthenticationError",
    "InternalError",
    "ConnectionLostError",
    "UnexpectedAnswerError",
    "ServerUnreachableError",
    "ConfigError",
    "InvalidParamsError",
  ]);
  for (const error of errors) expect(shown(error)).not.toContain("canary");
});
