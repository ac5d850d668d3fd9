import { createHash } from "node:crypto";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  CodeError,
  CommandExitError,
  InvalidParamsError,
  PythonSandbox,
  RequestTimeoutError,
  type Result,
  RunTimeoutError,
  SandboxNotFoundError,
} from "../../src/index.js";
import { access, failure, newName } from "./server.js";

let sandbox: PythonSandbox;

beforeAll(async () => {
  sandbox = await PythonSandbox.create({ ...access, name: newName(), envs: { GREETING: "hello" }, workdir: "/tmp" });
});

afterAll(() => sandbox?.stop());

/** Code that defines a PNG with one pixel, which the last expression shows. */
const png = `
import struct, zlib
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
class Pixel:
    def _repr_png_(self):
        header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
        data = zlib.compress(b"\\0\\xff\\0\\0")
        return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    def _repr_html_(self):
        return "<b>pixel</b>"
Pixel()`;

describe("code", () => {
  test("streams its output while it runs, and its results", async () => {
    const order: string[] = [];
    // The code goes on only when the callback has received the first line.
    const code = [
      "import os, sys",
      "if os.path.exists('/tmp/go'): os.remove('/tmp/go')",
      "os.mkfifo('/tmp/go')",
      "print('one', flush=True)",
      "open('/tmp/go').read()",
      "print('two', file=sys.stderr)",
      "display('shown')",
      "6 * 7",
    ].join("\n");
    const execution = await sandbox.run(code, {
      onStdout: async (text) => {
        order.push(`stdout ${text}`);
        await sandbox.command.run("sh", ["-c", "echo >/tmp/go"]);
      },
      onStderr: (text) => void order.push(`stderr ${text}`),
      onResult: (result) => void order.push(`result ${result.text} ${result.isMain}`),
    });
    expect(order).toEqual(["stdout one\n", "stderr two\n", "result 'shown' false", "result 42 true"]);
    expect(execution.lines).toEqual([
      { stream: "stdout", text: "one" },
      { stream: "stderr", text: "two" },
      { stream: "stdout", text: "'shown'" },
      { stream: "stdout", text: "42" },
    ]);
    expect(execution).toMatchObject({ status: "success", exitCode: 0, language: "python", stateLost: false });
    expect(execution.count).toBeGreaterThan(0);
    // Without callbacks, the results are at the end.
    expect((await sandbox.run("display('shown'); print('one'); 6 * 7")).stdout).toBe("one\n'shown'\n42");
  });

  test.each([["with a stream"], [""]])("shows a PNG %s", async (stream) => {
    const shown: Result[] = [];
    const execution = await sandbox.run(png, stream ? { onResult: (result) => shown.push(result) } : undefined);
    const [result] = execution.results;
    if (stream) expect(shown.map(({ raw }) => raw)).toEqual([result?.raw]);
    expect(result?.formats().sort()).toEqual(["html", "png", "text"]);
    expect(result?.html).toBe("<b>pixel</b>");
    expect(result?.isMain).toBe(true);
    const image = Buffer.from(execution.png ?? "", "base64");
    expect(image.subarray(0, 8).toString("latin1")).toBe("\x89PNG\r\n\x1a\n");
    expect([image.readUInt32BE(16), image.readUInt32BE(20)]).toEqual([1, 1]);
  });

  test.each([["with a stream"], [""]])("has an exception %s", async (stream) => {
    const execution = await sandbox.run("print('before')\n1 / 0", stream ? { onStdout: () => {} } : undefined);
    expect(execution.exception).toMatchObject({ name: "ZeroDivisionError", value: "division by zero" });
    expect(execution.exception?.traceback).toContain("Traceback");
    expect(execution).toMatchObject({ status: "error", exitCode: 1, stdout: "before" });
    expect(execution.stderr).toContain("ZeroDivisionError: division by zero");
    expect(() => execution.raiseForStatus()).toThrow(CodeError);
    const error = await failure(Promise.resolve().then(() => execution.raiseForStatus()));
    expect(error).toMatchObject({ name: "CodeError", message: "ZeroDivisionError: division by zero" });
    expect((error as CodeError).execution).toBe(execution);
    const good = await sandbox.run("1");
    expect(good.raiseForStatus()).toBe(good);
  });

  test.each([["with a stream"], [""]])("that takes too long has its output so far on the error %s", async (stream) => {
    const code = "print('one')\nwhile True: pass";
    const error = await failure(sandbox.run(code, { timeout: 1, ...(stream && { onStdout: () => {} }) }));
    expect(error).toBeInstanceOf(RunTimeoutError);
    expect((error as RunTimeoutError).execution?.stdout).toBe("one");
    expect((error as RunTimeoutError).data).toMatchObject({ timed_out: true });
  });

  test("a callback that throws ends the run, and run throws its error", async () => {
    const reason = new Error("enough");
    const run = sandbox.run("kept = 1\nprint('one', flush=True)\nwhile True: pass", {
      onStdout: async () => {
        throw reason;
      },
    });
    expect(await failure(run)).toBe(reason);
    expect((await sandbox.run("kept")).stdout).toBe("1"); // otherwise it would wait for the run
  });

  test("has its own directory, environment, user and input", async () => {
    const code = "import os; print(os.getcwd(), os.environ['A'], os.environ['GREETING'], os.getuid(), input())";
    const options = { cwd: "/", envs: { A: "1" }, user: "nobody", stdin: "in\n" };
    expect((await sandbox.run(code, options)).stdout).toMatch(/^\/ 1 hello [1-9]\d* in$/);
    expect((await sandbox.run("echo $((6 * 7))", { language: "bash" })).stdout).toBe("42");
  });

  test("runs in contexts, which have their own variables", async () => {
    const context = await sandbox.contexts.create({ name: "report", cwd: "/" });
    expect(context).toMatchObject({ name: "report", language: "python", cwd: "/", count: 0, busy: false });
    await sandbox.run("x = 'default'");
    await sandbox.run("x = 'report'", { context });
    expect((await sandbox.run("x")).stdout).toBe("'default'");
    expect((await sandbox.run("x", { context: "report" })).stdout).toBe("'report'");
    expect((await sandbox.contexts.list()).map(({ name }) => name)).toEqual(
      expect.arrayContaining(["python", "report"]),
    );
    const restarted = await sandbox.contexts.restart(context);
    expect(restarted.pid).not.toBe(context.pid);
    expect((await sandbox.run("x", { context })).exception?.name).toBe("NameError");
    await sandbox.contexts.remove(context);
    expect(await failure(sandbox.run("x", { context }))).toBeInstanceOf(SandboxNotFoundError);
  });
});

describe("commands", () => {
  test("stream their output, and fail with raiseForStatus", async () => {
    const texts: string[] = [];
    const execution = await sandbox.command.run("sh", ["-c", "echo é; echo no >&2; exit 3"], {
      onStdout: (text) => void texts.push(text),
      onStderr: (text) => void texts.push(text),
    });
    expect(texts.sort()).toEqual(["no\n", "é\n"]);
    expect(execution).toMatchObject({ command: "sh", exitCode: 3, stdout: "é", stderr: "no" });
    const error = await failure(Promise.resolve().then(() => execution.raiseForStatus()));
    expect(error).toBeInstanceOf(CommandExitError);
    expect(error).toMatchObject({ exitCode: 3, stdout: "é", stderr: "no", message: "sh: exit code 3: no" });
  });

  test.each([["with a stream"], [""]])("pass bytes through unaltered %s", async (stream) => {
    const stdin = Uint8Array.from({ length: 100_000 }, (_, i) => (i * 7) ^ (i >> 8));
    const options = { stdin, binary: true, ...(stream && { onStdout: () => {} }) };
    const { stdoutBytes } = await sandbox.command.run("cat", [], options);
    expect(Buffer.from(stdin).equals(stdoutBytes as Uint8Array)).toBe(true);
    const md5 = await sandbox.command.run("md5sum", [], { stdin: "é\r\n\0" });
    expect(md5.stdout).toBe(`${createHash("md5").update("é\r\n\0").digest("hex")}  -`);
  });

  test("have their own directory, environment and user", async () => {
    const options = { cwd: "/", envs: { A: "1" }, user: "nobody" };
    const { stdout } = await sandbox.command.run("sh", ["-c", "pwd; echo $A $GREETING; id -un"], options);
    expect(stdout).toBe("/\n1 hello\nnobody");
  });

  test("that take too long have their output so far on the error", async () => {
    const error = await failure(sandbox.command.run("sh", ["-c", "echo one; exec sleep 1000"], { timeout: 1 }));
    expect((error as RunTimeoutError).execution).toMatchObject({ command: "sh", stdout: "one", exitCode: -1 });
  });

  test("refuse arguments of the wrong type", async () => {
    const error = await failure(sandbox.command.run("echo", "hello" as never));
    expect(error).toBeInstanceOf(InvalidParamsError);
    // The server also checks what this package does not know.
    expect(await failure(sandbox.run("1", { language: "cobol" }))).toBeInstanceOf(InvalidParamsError);
  });
});

describe("processes", () => {
  test("go on in the background: start, list, connect, input, logs, signal, wait", async () => {
    const started = await sandbox.process.start("sh", ["-c", "echo $A; pwd; exec cat"], {
      tag: "worker",
      openStdin: true,
      stdin: new Uint8Array([0xff, 0x0a]),
      envs: ["A=1"],
      cwd: "/",
    });
    expect((await sandbox.process.list()).find(({ pid }) => pid === started.pid)).toMatchObject({
      tag: "worker",
      command: "sh",
      running: true,
      terminal: false,
    });
    const connected = await sandbox.process.connect("worker");
    expect(connected.pid).toBe(started.pid);
    await connected.sendStdin("hello\n");
    const received: Buffer[] = [];
    for await (const { stream, bytes } of started.output()) {
      expect(stream).toBe("stdout");
      received.push(Buffer.from(bytes));
      if (Buffer.concat(received).includes("hello\n")) break;
    }
    expect(Buffer.concat(received).toString("latin1")).toBe("1\n/\n\xff\nhello\n");
    const logs = await started.logs();
    expect(logs.stdout).toBe("1\n/\n\ufffd\nhello");
    expect(logs).toMatchObject({ running: true, exitCode: -1, skippedBytes: 0 });
    expect(Buffer.from(logs.stdoutBytes).toString("latin1")).toBe("1\n/\n\xff\nhello\n");

    const timeout = await failure(started.wait({ timeout: 0.5 }));
    expect(timeout).toBeInstanceOf(RequestTimeoutError);
    expect((timeout as RequestTimeoutError).execution?.stdout).toContain("hello");

    await started.signal("TERM");
    const execution = await (await sandbox.process.connect(started.pid)).wait();
    expect(execution).toMatchObject({ running: false, exitCode: 143, success: false, exit: { signal: "TERM" } });
    expect(() => execution.raiseForStatus()).toThrow(CommandExitError);
    expect((await started.info()).running).toBe(false);
    await started.kill(); // no error
  });

  test("get all input in its order, and wait streams the output", async () => {
    const process = await sandbox.process.start("cat", [], { openStdin: true });
    const texts = Array.from({ length: 20 }, (_, i) => `${i} ${"x".repeat(i === 10 ? 600_000 : 10)}\n`);
    void Promise.all(texts.map((text) => process.sendStdin(text)));
    const closed = process.closeStdin();
    let streamed = "";
    const execution = await process.wait({ onStdout: (text) => void (streamed += text) });
    await closed;
    expect(streamed).toBe(texts.join(""));
    expect(Buffer.from(execution.stdoutBytes).toString()).toBe(streamed);
    expect(execution.raiseForStatus().exitCode).toBe(0);
  });

  test("are killed at the end of an await using block", async () => {
    let pid: number;
    {
      await using process = await sandbox.process.start("sleep", ["1000"]);
      pid = process.pid;
    }
    expect((await (await sandbox.process.connect(pid)).wait()).exitCode).toBe(137);
    expect(await failure(sandbox.process.connect("no-such-tag"))).toBeInstanceOf(SandboxNotFoundError);
  });
});

describe("terminals", () => {
  test("run a full-screen program, which gets keys and new sizes", async () => {
    // The image has neither vim nor less.
    const program = `
import curses, os
os.environ["ESCDELAY"] = "10000" # so that the escape sequence of a key may arrive slowly
def main(screen):
    screen.timeout(100) # so that no signal is lost between two reads
    key, shown = 0, None
    while key != ord("q"):
        rows, cols = screen.getmaxyx()
        state = f"size {cols}x{rows} key {key} "
        if state != shown:
            screen.clear()
            screen.addstr(0, 0, state)
            screen.refresh()
            shown = state
        pressed = screen.getch()
        if pressed not in (-1, curses.KEY_RESIZE):
            key = pressed
curses.wrapper(main)`;
    await using pty = await sandbox.pty.start("python3", ["-c", program], { cols: 100, rows: 30, tag: "screen" });
    const connected = await sandbox.pty.connect("screen");
    let screen = "";
    // Each step waits for a text on the screen, and then does something.
    const steps: [string, () => Promise<void>][] = [
      ["size 100x30 key 0 ", () => pty.sendInput("\u001bOA")], // the arrow up
      ["size 100x30 key 259 ", () => connected.resize(70, 20)],
      ["size 70x20 key 259 ", () => connected.sendInput(new Uint8Array([0x71]))],
    ];
    for await (const { text } of pty.output()) {
      screen += text;
      const [step] = steps;
      if (!step || !screen.includes(step[0])) continue;
      steps.shift();
      screen = "";
      await step[1]();
    }
    expect(steps).toEqual([]);
    expect(await pty.wait()).toMatchObject({ exitCode: 0 });
    expect((await sandbox.process.list()).find(({ pid }) => pid === pty.pid)?.terminal).toBe(true);
  });

  test("run a shell", async () => {
    await using pty = await sandbox.pty.start();
    await pty.sendInput("echo $((6 * 7)) $TERM; stty size; exit 3\n");
    const { stdout, exitCode } = await pty.wait();
    expect(stdout).toContain("42 xterm-256color");
    expect(stdout).toContain("24 80");
    expect(exitCode).toBe(3);
  });
});
