import { mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import {
  AuthenticationError,
  CommandNotFoundError,
  ConflictError,
  InvalidParamsError,
  PythonSandbox,
  RunTimeoutError,
  type SandboxOptions,
} from "../../src/index.js";
import { access, failure, newName } from "./server.js";

// Code that a test interrupts would otherwise run longer than the time limit of the test.

const options = { ...access, name: newName(), envs: { GREETING: "hello" }, workdir: "/tmp" };
let sandbox: PythonSandbox;

beforeAll(async () => {
  sandbox = await PythonSandbox.create(options);
});

afterAll(() => sandbox?.stop());

describe("code", () => {
  test("returns values of expressions and printed text, and keeps definitions", async () => {
    expect((await sandbox.run("6 * 7")).stdout).toBe("42");
    await sandbox.run("x = 'é\u{1f600}'\ndef f(n): return n + 1");
    const execution = await sandbox.run("print(x)\nprint(f(1))");
    expect(execution.lines).toEqual([
      { stream: "stdout", text: "é\u{1f600}" },
      { stream: "stdout", text: "2" },
    ]);
    expect([execution.status, execution.language, execution.hasError()]).toEqual(["success", "python", false]);
  });

  test("that raises an exception", async () => {
    await sandbox.run("kept = 1");
    const execution = await sandbox.run("print('before')\n1 / 0");
    expect(execution.status).toBe("error");
    expect(execution.hasError()).toBe(true);
    expect(await execution.output()).toBe("before");
    expect(await execution.error()).toContain("ZeroDivisionError");
    expect((await sandbox.run("kept")).stdout).toBe("1");
  });

  test("that takes too long is interrupted, and the session continues", async () => {
    await sandbox.run("kept = 2");
    const error = await failure(sandbox.run("while True: pass", { timeout: 1 }));
    expect(error).toBeInstanceOf(RunTimeoutError);
    expect(error).toMatchObject({ code: -32007, status: 504, requestId: expect.stringMatching(/./) });
    expect((await sandbox.run("kept")).stdout).toBe("2");
  });

  test("that is aborted ends on the server: the next run starts, and the state is kept", async () => {
    await sandbox.run("kept = 3");
    const controller = new AbortController();
    const done = failure(
      sandbox.run("import time\nopen('/tmp/began', 'w').close()\ntime.sleep(1000)", { signal: controller.signal }),
    );
    await sandbox.command.run("sh", ["-c", "until test -e /tmp/began; do sleep 0.1; done"]);
    controller.abort();
    expect(await done).toMatchObject({ name: "AbortError" });
    expect((await sandbox.run("kept")).stdout).toBe("3"); // otherwise it would wait for the aborted run
  });

  test("that the server refuses", async () => {
    expect(await failure(sandbox.run("#".repeat(3 << 20)))).toMatchObject({ name: "InvalidRequestError", status: 413 });
    expect(await failure(sandbox.run("'\ud800'"))).toMatchObject({ name: "ParseError", status: 400 });
    expect((await sandbox.run("1")).stdout).toBe("1");
  });

  test("runs concurrent runs one by one", async () => {
    await sandbox.run("n = 0");
    await Promise.all(Array.from({ length: 10 }, () => sandbox.run("n += 1")));
    expect((await sandbox.run("n")).stdout).toBe("10");
  });
});

describe("commands", () => {
  test("have streams and exit codes", async () => {
    const ended = await sandbox.command.run("sh", ["-c", "echo out; echo err >&2; exit 3"]);
    expect(ended).toMatchObject({ exitCode: 3, success: false, stdout: "out", stderr: "err", command: "sh" });
    expect(await sandbox.command.run("true")).toMatchObject({ exitCode: 0, success: true, lines: [] });
  });

  test("get their arguments without a shell", async () => {
    const args = ["-c", 'import sys; print(len(sys.argv), *sys.argv[1:], sep="|")', "a b", "$HOME", "", "é"];
    expect((await sandbox.command.run("python3", args)).stdout).toBe("5|a b|$HOME||é");
  });

  test("have the environment and the working directory given to start", async () => {
    expect((await sandbox.command.run("sh", ["-c", "echo $GREETING; pwd"])).stdout).toBe("hello\n/tmp");
  });

  test("that do not exist are reported", async () => {
    const error = await failure(sandbox.command.run("no-such-program"));
    expect(error).toBeInstanceOf(CommandNotFoundError);
    expect(error).toMatchObject({ code: -32008, status: 422 });
  });

  test.each([[1], [{ timeout: 1 }]])("that take too long are ended, with %j", async (limit) => {
    expect(await failure(sandbox.command.run("sleep", ["1000"], limit))).toBeInstanceOf(RunTimeoutError);
  });

  test("that are aborted are ended in the sandbox", async () => {
    const controller = new AbortController();
    const done = failure(
      sandbox.command.run("sh", ["-c", "echo $$ >/tmp/pid.new; mv /tmp/pid.new /tmp/pid; exec sleep 1000"], controller),
    );
    await sandbox.command.run("sh", ["-c", "until test -e /tmp/pid; do sleep 0.1; done"]);
    controller.abort();
    expect(await done).toMatchObject({ name: "AbortError" });
    const gone = "while kill -0 $(cat /tmp/pid) 2>/dev/null; do sleep 0.1; done";
    expect((await sandbox.command.run("sh", ["-c", gone])).exitCode).toBe(0);
  });

  test("run concurrently", async () => {
    const all = Array.from({ length: 5 }, (_, i) => sandbox.command.run("echo", [String(i)]));
    expect((await Promise.all(all)).map(({ stdout }) => stdout)).toEqual(["0", "1", "2", "3", "4"]);
  });
});

test("metrics", async () => {
  const metrics = await sandbox.metrics.all();
  expect(metrics).toMatchObject({ name: options.name, running: true });
  expect(metrics.cpu_usage).toBeGreaterThanOrEqual(0);
  expect(metrics.memory_usage).toBeGreaterThan(0);
  expect(metrics.disk_usage).toBeGreaterThanOrEqual(0);
  expect(await sandbox.metrics.memory()).toBeGreaterThan(0);
  expect(await sandbox.metrics.isRunning()).toBe(true);
});

describe("starting it again", () => {
  test("with the same configuration uses the running sandbox", async () => {
    await sandbox.run("kept = 4");
    const again = await PythonSandbox.create(options);
    expect((await again.run("kept")).stdout).toBe("4");
  });

  test("with another configuration is refused", async () => {
    const error = await failure(PythonSandbox.create({ ...options, memory: 300 }));
    expect(error).toBeInstanceOf(ConflictError);
    expect((error as Error).message).toContain("memory");
  });

  test.each<[string, SandboxOptions]>([
    ["volumes", { volumes: ["/etc:/etc"] }],
    ["ports", { ports: ["80:80"] }],
    ["depends_on", { dependsOn: ["y"] }],
    ["shell", { shell: "/bin/sh" }],
    ["scripts", { scripts: { start: "true" } }],
    ["exec", { exec: "true" }],
  ])("with %s, which the server does not support, is refused", async (name, options) => {
    const error = await failure(PythonSandbox.create({ ...access, ...options }));
    expect(error).toBeInstanceOf(InvalidParamsError);
    expect(error).toMatchObject({ code: -32602, status: 400 });
    expect((error as Error).message).toContain(`config.${name} is not supported`);
  });
});

describe("keys", () => {
  test.each([`${access.apiKey}x`, "msb_wrong", undefined])("that are wrong or missing are refused", async (apiKey) => {
    vi.stubEnv("MSB_API_KEY", "");
    const error = await failure(PythonSandbox.create({ ...options, apiKey }));
    vi.unstubAllEnvs();
    expect(error).toBeInstanceOf(AuthenticationError);
    expect(error).toMatchObject({ code: -32002, status: 401, requestId: expect.stringMatching(/./) });
    expect((error as Error).message.includes("No API key was sent")).toBe(apiKey === undefined);
  });

  test("are read from the environment and from a .env file", async () => {
    const { serverUrl, apiKey, ...rest } = options;
    vi.stubEnv("MSB_SERVER_URL", serverUrl);
    vi.stubEnv("MSB_API_KEY", apiKey);
    expect((await PythonSandbox.create(rest)).isStarted).toBe(true);
    vi.stubEnv("MSB_SERVER_URL", "");
    vi.stubEnv("MSB_API_KEY", "");
    const directory = realpathSync(mkdtempSync(join(tmpdir(), "msb-live-")));
    writeFileSync(join(directory, ".env"), `MSB_API_KEY="${apiKey}"\nMSB_SERVER_URL=${serverUrl}\n`, { mode: 0o600 });
    const before = process.cwd();
    process.chdir(directory);
    try {
      expect((await PythonSandbox.create(rest)).apiKey).toBe(apiKey);
    } finally {
      process.chdir(before);
      vi.unstubAllEnvs();
      rmSync(directory, { recursive: true });
    }
  });
});
