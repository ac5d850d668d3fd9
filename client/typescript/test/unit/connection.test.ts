import { execFileSync } from "node:child_process";
import { getEventListeners } from "node:events";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { Agent } from "node:http";
import * as https from "node:https";
import { type AddressInfo, Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import {
  type BaseSandbox,
  ConnectionLostError,
  listSandboxes,
  PythonSandbox,
  RequestTimeoutError,
  ResourceExhaustedError,
  ServerUnreachableError,
  UnavailableError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { drop, ok, errorReply, Stub, unused } from "../stub.js";

// The pauses between attempts are recorded. They are skipped unless a test sets skipPauses to false.
const pauses: number[] = [];
let skipPauses = true;
let onPause = async () => {};
vi.mock("node:timers/promises", async (original) => {
  const timers = await original<typeof import("node:timers/promises")>();
  return {
    ...timers,
    setTimeout: async (pause: number, value: unknown, options: object) => {
      pauses.push(pause);
      await onPause();
      return timers.setTimeout(skipPauses ? 0 : pause, value, options);
    },
  };
});

let stub: Stub;

beforeEach(async () => {
  pauses.length = 0;
  skipPauses = true;
  onPause = async () => {};
  stub = await Stub.start();
});

afterEach(async () => {
  vi.useRealTimers();
  vi.restoreAllMocks();
  await stub[Symbol.asyncDispose]();
});

/** Uses fake timers, which only fire when a test advances them. Otherwise a slow machine could fail the test. */
function onlyAdvancedTimers(): void {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
}

/** The calls by their method names on the server. */
const calls: Record<string, (sandbox: BaseSandbox, options?: { signal: AbortSignal }) => Promise<unknown>> = {
  "sandbox.start": (sandbox, options) => new PythonSandbox({ ...stub.access, name: sandbox.name }).start(options),
  "sandbox.list": (_, options) => listSandboxes({ ...stub.access, ...options }),
  "sandbox.get": (sandbox, options) => sandbox.info(options),
  "sandbox.metrics.get": (sandbox, options) => sandbox.metrics.all(options),
  "sandbox.repl.run": (sandbox, options) => sandbox.run("1", options),
  "sandbox.command.run": (sandbox, options) => sandbox.command.run("true", [], options),
  "sandbox.stop": (sandbox, options) => sandbox.stop(options),
};
const idempotent = ["sandbox.start", "sandbox.list", "sandbox.get", "sandbox.metrics.get"];

/** Expects a number of pauses, each of length ms or up to a quarter more. */
function expectPauses(count: number, length: number): void {
  expect(pauses).toHaveLength(count);
  expect(Math.min(...pauses, length)).toBe(length);
  expect(Math.max(...pauses, length)).toBeLessThanOrEqual(length * 1.25);
}

async function attemptsAt(method: string): Promise<{ attempts: number; error: unknown }> {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.sent.length = 0;
  const error = await calls[method]?.(sandbox).then(
    () => undefined,
    (error: unknown) => error,
  );
  return { attempts: stub.sent.length, error };
}

describe.each(Object.keys(calls))("%s is retried only if that is safe", (method) => {
  const attempts = idempotent.includes(method) ? 3 : 1;

  // The first reply is for the start before the call.
  const replies = (...replies: Parameters<Stub["answer"]>[1][]) =>
    stub.answer(method, ...(method === "sandbox.start" ? [ok("started"), ...replies] : replies));

  test("after a lost connection", async () => {
    replies(drop);
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(ConnectionLostError) });
  });

  test("after too many requests, where nothing began", async () => {
    replies(errorReply(429, -32006, { "Retry-After": "2" }));
    expect(await attemptsAt(method)).toEqual({ attempts: 3, error: expect.any(ResourceExhaustedError) });
    expectPauses(2, 2000);
  });

  test("after too much output, where a run began", async () => {
    replies(errorReply(429, -32006));
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(ResourceExhaustedError) });
  });

  test("while the server is not ready", async () => {
    replies(errorReply(503, -32009, { "Retry-After": "1" }));
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(UnavailableError) });
    expectPauses(attempts - 1, 1000);
  });

  test("and not after a long Retry-After", async () => {
    replies(errorReply(429, -32006, { "Retry-After": "11" }));
    expect(await attemptsAt(method)).toMatchObject({ attempts: 1, error: { retryAfter: 11 } });
  });

  test("and not after a run that had begun", async () => {
    replies(errorReply(502, -32010, { "Retry-After": "1" }));
    expect((await attemptsAt(method)).attempts).toBe(1);
  });

  test("and not after other errors", async () => {
    replies(errorReply(500, -32603));
    expect((await attemptsAt(method)).attempts).toBe(1);
  });
});

test("a call succeeds after temporary failures", async () => {
  stub.answer("sandbox.start", errorReply(503, -32009), drop, ok("started"));
  const sandbox = await PythonSandbox.create(stub.access);
  expect(sandbox.isStarted).toBe(true);
  expect(stub.called).toHaveLength(3);
  expect(pauses[0]).toBeGreaterThanOrEqual(100);
  expect(pauses[1]).toBeGreaterThanOrEqual(200);
});

test("a run succeeds after the server was too busy", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const busy = errorReply(429, -32006, { "Retry-After": "1" });
  stub.answer("sandbox.repl.run", busy, busy, ok({ output: [{ stream: "stdout", text: "42" }] }));
  expect((await sandbox.run("6 * 7")).stdout).toBe("42");
  expect(pauses).toHaveLength(2);
});

test("if nothing listens, every call is retried, because none was sent", async () => {
  // Do not close the stub, because the stub of another test could get its port.
  const agent = new Agent();
  const connect = agent.createConnection.bind(agent);
  let down = false;
  agent.createConnection = (options, done) =>
    connect(down ? { ...options, port: new URL(unused).port } : options, done);
  const sandbox = await PythonSandbox.create({ ...stub.access, agent });
  down = true;
  const error = await sandbox.run("1").catch((error: unknown) => error);
  expect(error).toBeInstanceOf(ServerUnreachableError);
  expect(error).toMatchObject({
    message: expect.stringContaining("Start it with 'msb server start'"),
    cause: { code: "ECONNREFUSED" },
  });
  expect(pauses).toHaveLength(2);
  onPause = async () => {
    down = false;
  };
  expect((await sandbox.run("1")).stdout).toBe("42");
  expect(pauses).toHaveLength(3);
  expect(stub.called).toEqual(["sandbox.start", "sandbox.repl.run"]);
  // A host with several addresses, none of which accepts connections.
  const serverUrl = unused.replace("127.0.0.1", "localhost");
  await expect(PythonSandbox.create({ serverUrl })).rejects.toThrow("Start it with");
});

test("a call to an unknown host is not retried", async () => {
  // Do not use the machine's resolver, which may be slow.
  const agent = new Agent({
    lookup: (hostname, _, done) => {
      setImmediate(done, Object.assign(new Error(`getaddrinfo ENOTFOUND ${hostname}`), { code: "ENOTFOUND" }), "", 4);
    },
  });
  const error = await PythonSandbox.create({ serverUrl: "http://msb.invalid", agent }).catch((error: unknown) => error);
  expect(error).toBeInstanceOf(ServerUnreachableError);
  expect(error).toMatchObject({ cause: { code: "ENOTFOUND" } });
  expect(pauses).toHaveLength(0);
});

test("connections are reused, except those that the server closed", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  for (let i = 0; i < 10; i++) await sandbox.run("1");
  expect(stub.connections).toBe(1);
  stub.http.closeIdleConnections(); // in the same turn of the event loop, so that the client has not noticed
  await sandbox.run("1");
  expect(stub.connections).toBe(2);
  // After a long time, a new connection is used, even if the machine was suspended.
  const now = Date.now();
  vi.spyOn(Date, "now").mockReturnValue(now + 31_000);
  await sandbox.run("1");
  expect(stub.connections).toBe(3);
});

test("concurrent runs each have a connection", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const pending: (() => void)[] = [];
  const all = new Promise<void>((resolve) => {
    stub.answer("sandbox.repl.run", (_, response) => {
      pending.push(() => {
        response.setHeader("Content-Type", "application/json").end(ok({ output: [] }).body);
      });
      if (pending.length === 50) resolve();
    });
  });
  const runs = Array.from({ length: 50 }, () => sandbox.run("1"));
  await all;
  for (const answer of pending) answer();
  expect(await Promise.all(runs)).toHaveLength(50);
});

describe.each(Object.keys(calls))("%s is aborted by its signal", (method) => {
  test("during the call: the connection is closed, and the reason is thrown", async () => {
    const sandbox = await PythonSandbox.create(stub.access);
    const { began, ended } = stub.hang(method);
    const controller = new AbortController();
    const done = calls[method]?.(sandbox, { signal: controller.signal });
    await began;
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(done).rejects.toBe(reason);
    await ended;
    expect(getEventListeners(controller.signal, "abort")).toHaveLength(0);
    expect(stub.called.filter((called) => called === method)).toHaveLength(method === "sandbox.start" ? 2 : 1);
  });

  test("before the call: nothing is sent", async () => {
    const sandbox = await PythonSandbox.create(stub.access);
    await expect(calls[method]?.(sandbox, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      name: "AbortError",
    });
    expect(stub.called).toEqual(["sandbox.start"]);
  });
});

test("a signal ends the pause between attempts", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.metrics.get", errorReply(503, -32009, { "Retry-After": "10" }));
  const controller = new AbortController();
  skipPauses = false;
  onPause = async () => controller.abort();
  await expect(sandbox.metrics.all({ signal: controller.signal })).rejects.toMatchObject({ name: "AbortError" });
  expect(stub.called).toEqual(["sandbox.start", "sandbox.metrics.get"]);
});

test("a signal aborts reading a response", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const controller = new AbortController();
  stub.answer("sandbox.repl.run", (_, response) => {
    response.setHeader("Content-Type", "application/json").write('{"result":', () => controller.abort());
  });
  await expect(sandbox.run("1", controller)).rejects.toMatchObject({ name: "AbortError" });
});

test("calls remove their listeners from the signal", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const { signal } = new AbortController();
  for (let i = 0; i < 20; i++) await sandbox.run("1", { signal });
  expect(getEventListeners(signal, "abort")).toHaveLength(0);
});

test("the signal of a call does not affect other calls", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const { began } = stub.hang("sandbox.repl.run");
  const controller = new AbortController();
  const aborted = sandbox.run("1", { signal: controller.signal });
  await began;
  const other = sandbox.command.run("true");
  controller.abort();
  await expect(aborted).rejects.toMatchObject({ name: "AbortError" });
  expect((await other).exitCode).toBe(3);
});

describe("a call's timeout", () => {
  beforeEach(onlyAdvancedTimers);

  test("aborts a start and closes its connection", async () => {
    const { began, ended } = stub.hang("sandbox.start");
    const done = PythonSandbox.create({ ...stub.access, timeout: 0.05 }).catch((error: unknown) => error);
    await began;
    vi.advanceTimersByTime(50);
    expect(await done).toEqual(new RequestTimeoutError("sandbox.start: no answer within 0.05 s"));
    await ended;
    expect(stub.called).toEqual(["sandbox.start"]);
  });

  test("prevents a pause that would end after it: the last error is thrown", async () => {
    await expect(PythonSandbox.create({ serverUrl: unused, timeout: 0.09 })).rejects.toThrow(ServerUnreachableError);
    stub.answer("sandbox.start", errorReply(429, -32006, { "Retry-After": "5" }));
    await expect(PythonSandbox.create({ ...stub.access, timeout: 4 })).rejects.toThrow(ResourceExhaustedError);
    expect(stub.called).toEqual(["sandbox.start"]);
    expect(pauses).toEqual([]);
  });
});

describe("an address that does not respond", () => {
  beforeEach(onlyAdvancedTimers);

  /** Returns an agent whose connection is never established, and a promise that a request is waiting for it. */
  function unresponsive() {
    const agent = new Agent();
    const waiting = new Promise<void>((resolve) => {
      agent.createConnection = () => {
        setImmediate(() => setImmediate(resolve));
        return Object.assign(new Socket(), { connecting: true });
      };
    });
    return { agent, waiting };
  }

  test("fails after 10 s, regardless of the limit of the call", async () => {
    const { agent, waiting } = unresponsive();
    const done = PythonSandbox.create({ ...stub.access, agent }).catch((error: unknown) => error);
    await waiting;
    vi.advanceTimersByTime(9_999);
    expect(vi.getTimerCount()).toBe(2);
    vi.advanceTimersByTime(1);
    expect(await done).toBeInstanceOf(ServerUnreachableError);
    expect(vi.getTimerCount()).toBe(0);
    expect(pauses).toEqual([]);
  });

  test("leaves no timers behind when the call is aborted", async () => {
    const { agent, waiting } = unresponsive();
    const controller = new AbortController();
    const done = PythonSandbox.create({ ...stub.access, agent, signal: controller.signal });
    await waiting;
    controller.abort();
    await expect(done).rejects.toMatchObject({ name: "AbortError" });
    expect(vi.getTimerCount()).toBe(0);
  });
});

test("time limits of the calls", async () => {
  onlyAdvancedTimers();
  const limits: unknown[] = [];
  const timer = vi.spyOn(globalThis, "setTimeout");
  const wait = async (call: Promise<unknown>) => {
    await call;
    limits.push(timer.mock.calls[0]?.[1]);
    timer.mockClear();
  };
  const sandbox = new PythonSandbox(stub.access);
  await wait(sandbox.start());
  await wait(sandbox.run("1"));
  await wait(sandbox.run("1", { timeout: 0 }));
  await wait(sandbox.run("1", { timeout: 5 }));
  await wait(sandbox.run("1", { timeout: 1e9 }));
  await wait(sandbox.command.run("true", [], 5));
  await wait(sandbox.metrics.all());
  await wait(sandbox.stop());
  await wait(sandbox.start({ timeout: 7 }));
  await sandbox.stop();
  timer.mockClear();
  await wait(sandbox.start({ timeout: Infinity }));
  const none = 2 ** 31 - 1;
  expect(limits).toEqual([180_000, none, none, 125_000, none, 125_000, 30_000, 120_000, 7_000, none]);
  expect(vi.getTimerCount()).toBe(0);
});

test("a truncated response is a lost connection", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.repl.run", (request, response) => {
    response.setHeader("Content-Type", "application/json").write('{"result":', () => request.socket.destroy());
  });
  await expect(sandbox.run("1")).rejects.toThrow(ConnectionLostError);
});

test("a response that is not HTTP is reported as such", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.repl.run", (request) => request.socket.end("SSH-2.0-OpenSSH\r\n"));
  await expect(sandbox.run("1")).rejects.toThrow(UnexpectedAnswerError);
});

describe("TLS", () => {
  const directory = mkdtempSync(join(tmpdir(), "msb-tls-"));
  const [keyFile, certFile] = [join(directory, "key.pem"), join(directory, "cert.pem")];
  execFileSync(
    "openssl",
    [
      ...["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"],
      ...["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", keyFile, "-out", certFile],
    ],
    { stdio: "pipe" },
  );
  const cert = readFileSync(certFile);
  const server = https.createServer({ key: readFileSync(keyFile), cert });
  rmSync(directory, { recursive: true });

  beforeEach(async () => {
    server.removeAllListeners("request");
    server.on("request", (request, response) => stub.http.emit("request", request, response));
    await new Promise<void>((resolve) => server.listen(0, resolve));
  });

  afterEach(async () => {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  });

  const access = (host: string) => ({
    serverUrl: `https://${host}:${(server.address() as AddressInfo).port}`,
    apiKey: stub.access.apiKey,
  });

  test("unknown authority, and wrong name", async () => {
    const agent = new https.Agent({ ca: cert });
    for (const options of [access("localhost"), { ...access("127.0.0.1"), agent }]) {
      const error = await PythonSandbox.create(options).catch((error: unknown) => error);
      expect(error).toBeInstanceOf(ServerUnreachableError);
      expect((error as Error).message).toContain("NODE_EXTRA_CA_CERTS");
    }
    expect(stub.called).toEqual([]);
    expect(pauses).toEqual([]);
  });

  test("agent that trusts the authority", async () => {
    const agent = new https.Agent({ ca: cert, keepAlive: true });
    const sandbox = await PythonSandbox.create({ ...access("localhost"), agent });
    expect((await sandbox.run("1")).stdout).toBe("42");
    expect(stub.called).toEqual(["sandbox.start", "sandbox.repl.run"]);
    agent.destroy();
  });

  test("https URL of a plain http server", async () => {
    const error = await PythonSandbox.create({ serverUrl: stub.url.replace("http:", "https:") }).catch(
      (error) => error,
    );
    expect(error).toBeInstanceOf(ServerUnreachableError);
    expect(error.message).toContain("if the server speaks plain http");
  });
});
