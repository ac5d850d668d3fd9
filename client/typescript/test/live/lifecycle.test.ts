import { expect, test } from "vitest";
import { loadConfig } from "../../src/config.js";
import { ConflictError, listSandboxes, NodeSandbox, PythonSandbox, SandboxNotFoundError } from "../../src/index.js";
import { Server } from "../../src/server.js";
import { access, failure, newName } from "./server.js";

test("Node.js: values, state, errors, and stop", async () => {
  const sandbox = new NodeSandbox({ ...access, name: newName() });
  {
    await sandbox.start();
    await using started = sandbox;
    expect((await started.run("6 * 7")).stdout).toBe("42");
    await started.run("const numbers = [1, 2, 3]; function sum(a) { return a.reduce((x, y) => x + y) }");
    const execution = await started.run("console.log(sum(numbers)); console.error('no')");
    expect(execution).toMatchObject({ status: "success", stdout: "6", stderr: "no" });
    expect(execution.hasError()).toBe(true);
    const failed = await started.run("null.length");
    expect(failed.status).toBe("error");
    expect(failed.stderr).toContain("TypeError");
    expect((await started.run("numbers.length")).stdout).toBe("3");
  }
  expect(sandbox.isStarted).toBe(false);
  // After the stop, the name can be used again, and the state is gone.
  await sandbox.start();
  expect((await sandbox.run("typeof numbers")).stdout).toContain("undefined");
  await sandbox.stop();
});

test("several sandboxes at once are isolated; a sandbox that another program stopped is reported", async () => {
  const [one, other] = await Promise.all([PythonSandbox.create(access), PythonSandbox.create(access)]);
  expect(one.name).not.toBe(other.name);
  const info = await one.info();
  expect(info).toMatchObject({ name: one.name, state: "running", image: "microsandbox/python", cpus: 1, memory: 512 });
  expect(await listSandboxes({ ...access, namespace: "*" })).toContainEqual(info);
  await Promise.all([one.run("x = 'one'"), other.run("x = 'other'")]);
  const values = await Promise.all([one.run("print(x)"), other.run("print(x)")]);
  expect(values.map(({ stdout }) => stdout)).toEqual(["one", "other"]);
  const again = await PythonSandbox.create({ ...access, name: one.name });
  await Promise.all([again.stop(), other.stop()]);
  const error = await failure(one.run("x"));
  expect(error).toBeInstanceOf(SandboxNotFoundError);
  expect(error).toMatchObject({ code: -32003, status: 404 });
  expect(await one.metrics.isRunning()).toBe(false);
  expect(await failure(one.info())).toBeInstanceOf(SandboxNotFoundError);
  await one[Symbol.asyncDispose](); // does not throw
  expect(one.isStarted).toBe(false);
});

test("an aborted start leaves no sandbox", async () => {
  const name = newName();
  const reason = new Error("enough");
  const controller = new AbortController();
  const aborted = failure(PythonSandbox.create({ ...access, name, memory: 300, signal: controller.signal }));
  const server = new Server(loadConfig(access));
  const exists = () =>
    server.call({ method: "sandbox.metrics.get", params: { sandbox: name } }).then(
      () => true,
      (error: unknown) => {
        expect(error).toBeInstanceOf(SandboxNotFoundError);
        return false;
      },
    );
  while (!(await exists()));
  controller.abort(reason);
  expect(await aborted).toBe(reason);
  // A start with another configuration is refused as long as the first sandbox exists.
  await using sandbox = new PythonSandbox({ ...access, name });
  while (!sandbox.isStarted) {
    await sandbox.start().catch((error: unknown) => expect(error).toBeInstanceOf(ConflictError));
  }
  expect((await sandbox.run("1")).stdout).toBe("1");
});
