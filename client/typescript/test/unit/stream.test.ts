import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import {
  CodeError,
  CommandExitError,
  CommandNotFoundError,
  ConnectionLostError,
  InvalidParamsError,
  type MicrosandboxError,
  PythonSandbox,
  RequestTimeoutError,
  type Result,
  RunTimeoutError,
  SandboxNotFoundError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { errorReply, events, ok, Stub } from "../stub.js";

let stub: Stub;
let sandbox: PythonSandbox;

beforeEach(async () => {
  stub = await Stub.start();
  sandbox = await PythonSandbox.create(stub.access);
  stub.sent.length = 0;
});

afterEach(async () => {
  vi.useRealTimers();
  await stub[Symbol.asyncDispose]();
});

const output = (stream: string, text: string): [string, unknown] => ["output", { stream, text }];
const exception = { name: "ValueError", value: "bad", traceback: "Traceback\nValueError: bad\n" };
const exit = { exit_code: 143, signal: "TERM", timed_out: false };

async function failure(promise: Promise<unknown>): Promise<MicrosandboxError> {
  return promise.then(
    () => expect.unreachable(),
    (error: unknown) => error,
  ) as Promise<MicrosandboxError>;
}

describe("a run with callbacks", () => {
  test("passes pieces on in their order, and waits for the callbacks", async () => {
    stub.answer(
      "sandbox.repl.run",
      events(
        output("stdout", "é\u{1f600} on"),
        output("stderr", "warning"),
        output("stdout", "e\ntwo\n"),
        ["display", { data: { "text/plain": "a\nb", "image/png": "iVBOR" }, is_main: false }],
        ["newer", {}],
        ["exception", exception],
        ["result", { status: "error", language: "python", output: [], exit_code: 1, count: 7 }],
      ),
    );
    const order: unknown[] = [];
    const callback = (name: string) => async (value: string | Result) => {
      // The other callbacks would be called earlier if the run did not wait for this one.
      for (let turn = 0; turn < (name === "stdout" ? 20 : 0); turn++) await new Promise(setImmediate);
      order.push([name, typeof value === "string" ? value : value.formats()]);
    };
    const execution = await sandbox.run("1", {
      onStdout: callback("stdout"),
      onStderr: callback("stderr"),
      onResult: callback("result"),
    });
    expect(order).toEqual([
      ["stdout", "é\u{1f600} on"],
      ["stderr", "warning"],
      ["stdout", "e\ntwo\n"],
      ["result", ["text", "png"]],
    ]);
    expect(execution.lines).toEqual([
      { stream: "stdout", text: "é\u{1f600} one" },
      { stream: "stderr", text: "warning" },
      { stream: "stdout", text: "two" },
      { stream: "stdout", text: "a" },
      { stream: "stdout", text: "b" },
      { stream: "stderr", text: "Traceback" },
      { stream: "stderr", text: "ValueError: bad" },
    ]);
    expect(execution).toMatchObject({ status: "error", exitCode: 1, count: 7, png: "iVBOR", exception });
    expect(() => execution.raiseForStatus()).toThrow(CodeError);
    expect(stub.sent[0]?.headers.accept).toBe("text/event-stream");
  });

  test.each<[string, [string, unknown][], new (...args: never[]) => Error]>([
    ["the time limit", [["error", { code: -32007, message: "too long", data: { output: [] } }]], RunTimeoutError],
    ["the end of the connection", [], ConnectionLostError],
    ["an event that is not JSON of an object", [["output", 1]], UnexpectedAnswerError],
  ])("keeps what was streamed before %s, and is not repeated", async (_, last, kind) => {
    stub.answer("sandbox.repl.run", events(output("stdout", "one\n"), ["exception", exception], ...last));
    const error = await failure(sandbox.run("1", { onStdout: () => {} }));
    expect(error).toBeInstanceOf(kind);
    expect(error.execution).toMatchObject({ stdout: "one", status: "error", exception });
    expect(Object.keys(error)).not.toContain("execution");
    expect(stub.called).toEqual(["sandbox.repl.run"]);
  });

  test("leaves its connection for later calls", async () => {
    stub.answer("sandbox.repl.run", events(output("stdout", "a"), ["result", { output: [] }]));
    for (let i = 0; i < 5; i++) await sandbox.run("1", { onStdout: () => {} });
    expect(stub.connections).toBe(1);
  });

  test("is repeated only if it was refused before it began", async () => {
    const done: [string, unknown] = ["result", { exit_code: 0, success: true, output: [] }];
    stub.answer(
      "sandbox.command.run",
      errorReply(429, -32006, { "Retry-After": "0" }),
      events(output("stdout", "a"), done),
    );
    expect((await sandbox.command.run("sh", [], { onStdout: () => {} })).stdout).toBe("a");
    stub.answer("sandbox.command.run", errorReply(422, -32008));
    const error = await failure(sandbox.command.run("sh", [], { onStdout: () => {} }));
    expect(error).toBeInstanceOf(CommandNotFoundError);
    expect(error.execution).toBeUndefined();
    stub.answer("sandbox.command.run", ok({ output: [] })); // a server without streams
    expect(await failure(sandbox.command.run("sh", [], { onStdout: () => {} }))).toBeInstanceOf(UnexpectedAnswerError);
  });

  test.each(["a callback that throws", "a signal"])("ends at %s, and closes the connection", async (what) => {
    const reason = new Error("enough");
    const controller = new AbortController();
    let ended = () => {};
    const closed = new Promise<void>((resolve) => (ended = resolve));
    stub.answer("sandbox.repl.run", (request, response) => {
      request.socket.once("close", ended);
      response
        .setHeader("Content-Type", "text/event-stream")
        .write(`event: output\ndata: {"stream":"stdout","text":"a"}\n\n`);
    });
    const onStdout = () => {
      if (what === "a signal") controller.abort(reason);
      else throw reason;
    };
    expect(await failure(sandbox.run("1", { onStdout, signal: controller.signal }))).toBe(reason);
    await closed;
  });

  test("fails if the server is silent for a minute", async () => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    let began = () => {};
    const sent = new Promise<void>((resolve) => (began = resolve));
    stub.answer("sandbox.repl.run", (_, response) => {
      response.setHeader("Content-Type", "text/event-stream").write(": keep-alive\n\n", began);
    });
    const error = failure(sandbox.run("1", { onStdout: () => {} }));
    await sent;
    let settled = false;
    void error.then(() => (settled = true));
    while (!settled) {
      await vi.advanceTimersByTimeAsync(30_000);
      await new Promise(setImmediate);
    }
    expect(await error).toBeInstanceOf(ConnectionLostError);
    expect((await error).message).toContain("nothing arrived for 60 s");
  });
});

describe("a run without callbacks", () => {
  test("has results, whose text counts as output", async () => {
    const results = [
      { data: { "text/plain": "1" }, is_main: false },
      { data: { "text/html": "<b>", "application/json": { a: 1 }, "x/y": "z" }, is_main: true },
    ];
    const result = { status: "success", language: "python", output: [{ stream: "stdout", text: "0" }], exit_code: 0 };
    stub.answer("sandbox.repl.run", ok({ ...result, results, state_lost: true }));
    const execution = await sandbox.run("1");
    expect(execution.stdout).toBe("0\n1");
    expect(execution.raiseForStatus().results.map((result) => result.formats())).toEqual([
      ["text"],
      ["html", "json", "x/y"],
    ]);
    expect(execution.results[1]).toMatchObject({ isMain: true, html: "<b>", json: { a: 1 }, text: undefined });
    expect([execution.png, execution.exception, execution.stateLost]).toEqual([undefined, undefined, true]);
  });

  test("that fails has its output on the error", async () => {
    const data = { output: [{ stream: "stdout", text: "one" }], truncated: true, timed_out: true };
    const body = { jsonrpc: "2.0", error: { code: -32007, message: "too long", data }, id: 1 };
    const reply = { status: 504, body: JSON.stringify(body) };
    stub.answer("sandbox.repl.run", reply);
    stub.answer("sandbox.command.run", reply);
    const error = await failure(sandbox.run("1"));
    expect(error.execution).toMatchObject({ stdout: "one", truncated: true, status: "error" });
    expect(error.data).toEqual(data);
    expect((await failure(sandbox.command.run("ls", ["-l"]))).execution).toMatchObject({
      command: "ls",
      args: ["-l"],
      stdout: "one",
      exitCode: -1,
    });
  });

  test("of a command passes bytes", async () => {
    const piece = { stream: "stdout", base64: "AP/D" };
    const rest = { stream: "stdout", base64: "qQo=" }; // the character is in two pieces
    stub.answer("sandbox.command.run", ok({ output: [piece, rest], exit_code: 0, success: true, command: "cat" }));
    const execution = await sandbox.command.run("cat", [], { stdin: "é", binary: true });
    expect([...(execution.stdoutBytes ?? [])]).toEqual([0, 0xff, 0xc3, 0xa9, 0x0a]);
    expect(execution.stdout).toBe("\0\ufffdé");
    expect(stub.sent[0]?.params).toMatchObject({ stdin: "w6k=", encoding: "base64" });
    stub.answer("sandbox.command.run", ok({ output: [], exit_code: 2, success: false, command: "cat" }));
    const failed = await sandbox.command.run("cat", [], { stdin: new Uint8Array([255]) });
    expect(() => failed.raiseForStatus()).toThrow(CommandExitError);
    expect(stub.sent[1]?.params).toMatchObject({ stdin: "/w==", encoding: "base64" });
  });
});

test("arguments of the wrong type are refused before anything is sent", async () => {
  const wrong = (value: unknown) => value as never;
  const { files, process, pty, contexts } = sandbox;
  const attempts: [string, () => Promise<unknown>][] = [
    [
      'args must be a list of strings, such as ["-l"], not the string "hello"',
      () => sandbox.command.run("echo", wrong("hello")),
    ],
    ["args must be a list of strings", () => sandbox.command.run("echo", wrong([1]))],
    ["command must be a string, not 1", () => sandbox.command.run(wrong(1))],
    ["command is empty", () => process.start("")],
    ["code must be a string", () => sandbox.run(wrong(undefined))],
    ["onStdout must be a function", () => sandbox.run("1", { onStdout: wrong("print") })],
    ["onResult must be a function", () => sandbox.run("1", { onResult: wrong({}) })],
    ["envs: the value of A must be a string, not 1", () => sandbox.run("1", { envs: wrong({ A: 1 }) })],
    ["envs must be a list of strings", () => sandbox.run("1", { envs: wrong([1]) })],
    ["cwd must be a string", () => sandbox.run("1", { cwd: wrong(1) })],
    ["user is empty", () => sandbox.run("1", { user: "" })],
    ["stdin must be a string or a Uint8Array", () => sandbox.command.run("cat", [], { stdin: wrong(5), binary: true })],
    ["context must be a context or its name", () => sandbox.run("1", { context: wrong(5) })],
    ["the options must be an object", () => process.start("cat", [], wrong("tag"))],
    ["pid must be an integer", () => process.connect(1.5)],
    ["the process must be a pid or a tag", () => process.connect(wrong({}))],
    ["cols must be an integer from 1 to 65535, not 0", () => pty.start("sh", [], { cols: 0 })],
    ["path must be a string", () => files.read(wrong(1))],
    ["format must be", () => files.read("a", { format: wrong("json") })],
    ["data must be a string or a Uint8Array", () => files.write("a", wrong(1))],
    ["data must be a string or a Uint8Array", () => files.write("a", wrong(undefined))],
    ["local is empty", () => files.upload("", "a")],
    ["onProgress must be a function", () => files.download("a", "b", { onProgress: wrong(1) })],
    ["port must be an integer", () => sandbox.forward(0)],
    ["context is empty", () => contexts.remove("")],
  ];
  for (const [message, attempt] of attempts) {
    const error = await failure(attempt());
    expect(error).toBeInstanceOf(InvalidParamsError);
    expect(error.message).toContain(message);
  }
  expect(stub.called).toEqual([]);
});

describe("processes", () => {
  test("send the right requests", async () => {
    stub.answer("sandbox.process.start", ok({ pid: 42 }));
    stub.answer("sandbox.process.get", ok({ pid: 42, tag: "a", terminal: true }));
    for (const method of ["input", "resize", "signal"]) stub.answer(`sandbox.process.${method}`, ok({}));
    const options = { cwd: "/", envs: { A: "1" }, user: "nobody", tag: "a", timeout: 5, stdin: "x", openStdin: true };
    const process = await sandbox.process.start("cat", ["-"], options);
    await process.sendStdin("é");
    await process.closeStdin();
    await process.signal(15);
    await process.kill();
    await sandbox.process.connect(7);
    const pty = await sandbox.pty.start(undefined, [], { rows: 5 });
    await (await sandbox.pty.connect("a")).resize(1, 2);
    await pty.sendInput(new Uint8Array([4]));
    expect(stub.sent.map(({ method, params: { sandbox, ...params } }) => [method.slice(16), params])).toEqual([
      [
        "start",
        {
          command: "cat",
          args: ["-"],
          cwd: "/",
          envs: ["A=1"],
          user: "nobody",
          tag: "a",
          timeout: 5,
          stdin: "x",
          open_stdin: true,
        },
      ],
      ["input", { pid: 42, data: "w6k=", encoding: "base64" }],
      ["input", { pid: 42, close: true }],
      ["signal", { pid: 42, signal: "15" }],
      ["signal", { pid: 42, signal: "KILL", all: true }],
      ["get", { pid: 7 }],
      ["start", { command: "bash", args: [], terminal: { cols: 80, rows: 5 } }],
      ["get", { tag: "a" }],
      ["resize", { pid: 42, cols: 1, rows: 2 }],
      ["input", { pid: 42, data: "BA==", encoding: "base64" }],
    ]);
  });

  test("are waited for, with their output", async () => {
    stub.answer("sandbox.process.get", ok({ pid: 42 }));
    const process = await sandbox.process.connect("a");
    stub.answer(
      "sandbox.process.connect",
      events(["output", { stream: "stderr", base64: "4pyT" }], ["result", { skipped_bytes: 3, running: false, exit }]),
    );
    const streamed: string[] = [];
    const execution = await process.wait({ onStderr: (text) => void streamed.push(text) });
    expect(streamed).toEqual(["✓"]);
    expect(execution).toMatchObject({ exitCode: 143, skippedBytes: 3, stderr: "✓", running: false, exit });
    expect([...execution.stderrBytes]).toEqual([0xe2, 0x9c, 0x93]);
    expect(() => execution.raiseForStatus()).toThrow("process 42: exit code 143: ✓");
    const pieces: unknown[] = [];
    for await (const { text } of process.output({ replay: false })) pieces.push(text);
    expect(pieces).toEqual(["✓"]);
    expect(stub.sent.at(-1)?.params).toMatchObject({ pid: 42, replay: false, encoding: "base64" });
    // A connection that breaks off is not repeated, because output would be missing or come twice.
    stub.answer("sandbox.process.connect", events(["output", { stream: "stderr", base64: "" }]));
    expect(await failure(process.wait())).toBeInstanceOf(ConnectionLostError);
  });

  test("that still run after the time limit have their output so far on the error", async () => {
    stub.answer("sandbox.process.get", ok({ pid: 42 }));
    stub.answer("sandbox.process.connect", (_, response) => {
      response.setHeader("Content-Type", "text/event-stream");
      response.write(`event: output\ndata: {"stream":"stdout","base64":"YQ=="}\n\n`);
    });
    const process = await sandbox.process.connect("a");
    let sent = () => {};
    const received = new Promise<void>((resolve) => (sent = resolve));
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    const error = failure(process.wait({ timeout: 3, onStdout: sent }));
    await received;
    await vi.advanceTimersByTimeAsync(3000);
    expect(await error).toBeInstanceOf(RequestTimeoutError);
    expect(await error).toMatchObject({ message: "process 42 still runs after 3 s", execution: { stdout: "a" } });
  });

  test("killing ignores that the process has ended, and no other error", async () => {
    stub.answer("sandbox.process.get", ok({ pid: 42 }));
    const process = await sandbox.process.connect("a");
    stub.answer("sandbox.process.signal", errorReply(409, -32005), errorReply(404, -32003));
    await process.kill();
    await expect(process.kill()).rejects.toThrow(SandboxNotFoundError);
    await process[Symbol.asyncDispose]();
  });
});

test("contexts send the right requests", async () => {
  const context = { context: "report", language: "python", cwd: "/", pid: 5, count: 1, busy: true };
  for (const method of ["create", "restart"]) stub.answer(`sandbox.context.${method}`, ok(context));
  stub.answer("sandbox.context.list", ok({ contexts: [context] }));
  stub.answer("sandbox.context.remove", ok({}));
  const created = await sandbox.contexts.create({ name: "report", cwd: "/", user: "nobody" });
  expect(created).toEqual({ name: "report", language: "python", cwd: "/", pid: 5, count: 1, busy: true });
  expect(await sandbox.contexts.list()).toEqual([created]);
  await sandbox.contexts.restart("report");
  await sandbox.contexts.remove(created);
  await sandbox.run("1", { context: created });
  expect(stub.sent.map(({ params: { sandbox, ...params } }) => params)).toEqual([
    { language: "python", context: "report", cwd: "/", user: "nobody" },
    {},
    { context: "report" },
    { context: "report" },
    { code: "1", results: true, context: "report" },
  ]);
});
