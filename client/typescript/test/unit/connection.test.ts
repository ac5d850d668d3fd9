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
  PythonSandbox,
  RequestTimeoutError,
  ResourceExhaustedError,
  ServerUnreachableError,
  UnavailableError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { drop, ok, refusal, Stub, unused } from "../stub.js";

// The pauses between attempts are noted, and not waited for unless a test says so.
const pauses: number[] = [];
let skipPauses = true;
let inPause = async () => {};
vi.mock("node:timers/promises", async (original) => {
  const timers = await original<typeof import("node:timers/promises")>();
  return {
    ...timers,
    setTimeout: async (pause: number, value: unknown, options: object) => {
      pauses.push(pause);
      await inPause();
      return timers.setTimeout(skipPauses ? 0 : pause, value, options);
    },
  };
});

let stub: Stub;

beforeEach(async () => {
  pauses.length = 0;
  skipPauses = true;
  inPause = async () => {};
  stub = await Stub.start();
});

afterEach(async () => {
  vi.useRealTimers();
  vi.restoreAllMocks();
  await stub[Symbol.asyncDispose]();
});

/** Timers that no machine is too slow for: they end when a test says so. */
function onlyAdvancedTimers(): void {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
}

/** The calls, by what they are called on the server. */
const calls: Record<string, (sandbox: BaseSandbox, options?: { signal: AbortSignal }) => Promise<unknown>> = {
  "sandbox.start": (sandbox, options) => new PythonSandbox({ ...stub.access, name: sandbox.name }).start(options),
  "sandbox.metrics.get": (sandbox, options) => sandbox.metrics.all(options),
  "sandbox.repl.run": (sandbox, options) => sandbox.run("1", options),
  "sandbox.command.run": (sandbox, options) => sandbox.command.run("true", [], options),
  "sandbox.stop": (sandbox, options) => sandbox.stop(options),
};
const repeatable = ["sandbox.start", "sandbox.metrics.get"];

/** There were so many pauses, of so many ms or up to a quarter more. */
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

describe.each(Object.keys(calls))("%s is sent again only if that is safe", (method) => {
  const attempts = repeatable.includes(method) ? 3 : 1;

  // The first answer is for the start before.
  const replies = (...replies: Parameters<Stub["answer"]>[1][]) =>
    stub.answer(method, ...(method === "sandbox.start" ? [ok("started"), ...replies] : replies));

  test("a lost connection", async () => {
    replies(drop);
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(ConnectionLostError) });
  });

  test("too many requests: nothing was begun", async () => {
    replies(refusal(429, -32006, { "Retry-After": "2" }));
    expect(await attemptsAt(method)).toEqual({ attempts: 3, error: expect.any(ResourceExhaustedError) });
    expectPauses(2, 2000);
  });

  test("too much output: a run was begun", async () => {
    replies(refusal(429, -32006));
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(ResourceExhaustedError) });
  });

  test("a server that is not ready", async () => {
    replies(refusal(503, -32009, { "Retry-After": "1" }));
    expect(await attemptsAt(method)).toEqual({ attempts, error: expect.any(UnavailableError) });
    expectPauses(attempts - 1, 1000);
  });

  test("a long Retry-After is the caller's to wait for", async () => {
    replies(refusal(429, -32006, { "Retry-After": "11" }));
    expect(await attemptsAt(method)).toMatchObject({ attempts: 1, error: { retryAfter: 11 } });
  });

  test("other errors", async () => {
    replies(refusal(500, -32603));
    expect((await attemptsAt(method)).attempts).toBe(1);
  });
});

test("it goes on after a failure that was passing", async () => {
  stub.answer("sandbox.start", refusal(503, -32009), drop, ok("started"));
  const sandbox = await PythonSandbox.create(stub.access);
  expect(sandbox.isStarted).toBe(true);
  expect(stub.called).toHaveLength(3);
  expect(pauses[0]).toBeGreaterThanOrEqual(100);
  expect(pauses[1]).toBeGreaterThanOrEqual(200);
});

test("a run goes on after it was turned away", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const busy = refusal(429, -32006, { "Retry-After": "1" });
  stub.answer("sandbox.repl.run", busy, busy, ok({ output: [{ stream: "stdout", text: "42" }] }));
  expect((await sandbox.run("6 * 7")).stdout).toBe("42");
  expect(pauses).toHaveLength(2);
});

test("nothing listens: every call is sent again, since none was", async () => {
  // The stub is not closed meanwhile: another test's could be given its port.
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
  inPause = async () => {
    down = false;
  };
  expect((await sandbox.run("1")).stdout).toBe("42");
  expect(pauses).toHaveLength(3);
  expect(stub.called).toEqual(["sandbox.start", "sandbox.repl.run"]);
  // Several addresses, of which none is listened at.
  const serverUrl = unused.replace("127.0.0.1", "localhost");
  await expect(PythonSandbox.create({ serverUrl })).rejects.toThrow("Start it with");
});

test("a name that is not there is not tried again", async () => {
  // Not the machine's resolver, which may take its time to say so.
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

test("connections are used again, but not those that the server closed", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  for (let i = 0; i < 10; i++) await sandbox.run("1");
  expect(stub.connections).toBe(1);
  stub.http.closeIdleConnections(); // in the same turn, so that the client cannot know
  await sandbox.run("1");
  expect(stub.connections).toBe(2);
  // After a long time, whatever the machine saw of it.
  const now = Date.now();
  vi.spyOn(Date, "now").mockReturnValue(now + 31_000);
  await sandbox.run("1");
  expect(stub.connections).toBe(3);
});

test("many runs at once each have a connection", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const waiting: (() => void)[] = [];
  const all = new Promise<void>((resolve) => {
    stub.answer("sandbox.repl.run", (_, response) => {
      waiting.push(() => {
        response.setHeader("Content-Type", "application/json").end(ok({ output: [] }).body);
      });
      if (waiting.length === 50) resolve();
    });
  });
  const runs = Array.from({ length: 50 }, () => sandbox.run("1"));
  await all;
  for (const answer of waiting) answer();
  expect(await Promise.all(runs)).toHaveLength(50);
});

describe.each(Object.keys(calls))("%s ends with its signal", (method) => {
  test("while it runs: the server sees it, and the reason is thrown", async () => {
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

  test("before it began: nothing is sent", async () => {
    const sandbox = await PythonSandbox.create(stub.access);
    await expect(calls[method]?.(sandbox, { signal: AbortSignal.abort() })).rejects.toMatchObject({
      name: "AbortError",
    });
    expect(stub.called).toEqual(["sandbox.start"]);
  });
});

test("a signal ends the pause between attempts", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.metrics.get", refusal(503, -32009, { "Retry-After": "10" }));
  const controller = new AbortController();
  skipPauses = false;
  inPause = async () => controller.abort();
  await expect(sandbox.metrics.all({ signal: controller.signal })).rejects.toMatchObject({ name: "AbortError" });
  expect(stub.called).toEqual(["sandbox.start", "sandbox.metrics.get"]);
});

test("a signal ends the reading of an answer", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const controller = new AbortController();
  stub.answer("sandbox.repl.run", (_, response) => {
    response.setHeader("Content-Type", "application/json").write('{"result":', () => controller.abort());
  });
  await expect(sandbox.run("1", controller)).rejects.toMatchObject({ name: "AbortError" });
});

test("a signal that outlives many calls is not left with their listeners", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  const { signal } = new AbortController();
  for (let i = 0; i < 20; i++) await sandbox.run("1", { signal });
  expect(getEventListeners(signal, "abort")).toHaveLength(0);
});

test("one call's signal leaves the others alone", async () => {
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

  test("a start is given up after it, and the server sees it", async () => {
    const { began, ended } = stub.hang("sandbox.start");
    const done = PythonSandbox.create({ ...stub.access, timeout: 0.05 }).catch((error: unknown) => error);
    await began;
    vi.advanceTimersByTime(50);
    expect(await done).toEqual(new RequestTimeoutError("sandbox.start: no answer within 0.05 s"));
    await ended;
    expect(stub.called).toEqual(["sandbox.start"]);
  });

  test("a pause that would end after it is not begun: the error is why there is one", async () => {
    await expect(PythonSandbox.create({ serverUrl: unused, timeout: 0.09 })).rejects.toThrow(ServerUnreachableError);
    stub.answer("sandbox.start", refusal(429, -32006, { "Retry-After": "5" }));
    await expect(PythonSandbox.create({ ...stub.access, timeout: 4 })).rejects.toThrow(ResourceExhaustedError);
    expect(stub.called).toEqual(["sandbox.start"]);
    expect(pauses).toEqual([]);
  });
});

describe("an address from which nothing comes", () => {
  beforeEach(onlyAdvancedTimers);

  /** A connection that never is, and the moment from which on a request waits for it. */
  function nowhere() {
    const agent = new Agent();
    const waiting = new Promise<void>((resolve) => {
      agent.createConnection = () => {
        setImmediate(() => setImmediate(resolve));
        return Object.assign(new Socket(), { connecting: true });
      };
    });
    return { agent, waiting };
  }

  test("is given up after 10 s, whatever the call's own limit", async () => {
    const { agent, waiting } = nowhere();
    const done = PythonSandbox.create({ ...stub.access, agent }).catch((error: unknown) => error);
    await waiting;
    vi.advanceTimersByTime(9_999);
    expect(vi.getTimerCount()).toBe(2);
    vi.advanceTimersByTime(1);
    expect(await done).toBeInstanceOf(ServerUnreachableError);
    expect(vi.getTimerCount()).toBe(0);
    expect(pauses).toEqual([]);
  });

  test("leaves nothing that runs when the call is aborted", async () => {
    const { agent, waiting } = nowhere();
    const controller = new AbortController();
    const done = PythonSandbox.create({ ...stub.access, agent, signal: controller.signal });
    await waiting;
    controller.abort();
    await expect(done).rejects.toMatchObject({ name: "AbortError" });
    expect(vi.getTimerCount()).toBe(0);
  });
});

test("how long each call waits for its answer", async () => {
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

test("an answer that ends before its end is a lost connection", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.repl.run", (request, response) => {
    response.setHeader("Content-Type", "application/json").write('{"result":', () => request.socket.destroy());
  });
  await expect(sandbox.run("1")).rejects.toThrow(ConnectionLostError);
});

test("what is not HTTP is said to be so", async () => {
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

  test("an authority that is not known, and a name that is another", async () => {
    const agent = new https.Agent({ ca: cert });
    for (const options of [access("localhost"), { ...access("127.0.0.1"), agent }]) {
      const error = await PythonSandbox.create(options).catch((error: unknown) => error);
      expect(error).toBeInstanceOf(ServerUnreachableError);
      expect((error as Error).message).toContain("NODE_EXTRA_CA_CERTS");
    }
    expect(stub.called).toEqual([]);
    expect(pauses).toEqual([]);
  });

  test("an agent that knows it", async () => {
    const agent = new https.Agent({ ca: cert, keepAlive: true });
    const sandbox = await PythonSandbox.create({ ...access("localhost"), agent });
    expect((await sandbox.run("1")).stdout).toBe("42");
    expect(stub.called).toEqual(["sandbox.start", "sandbox.repl.run"]);
    agent.destroy();
  });

  test("https where plain http is spoken", async () => {
    const error = await PythonSandbox.create({ serverUrl: stub.url.replace("http:", "https:") }).catch(
      (error) => error,
    );
    expect(error).toBeInstanceOf(ServerUnreachableError);
    expect(error.message).toContain("if the server speaks plain http");
  });
});
