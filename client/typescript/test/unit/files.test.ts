import {
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import {
  ConflictError,
  ConnectionLostError,
  PermissionDeniedError,
  PythonSandbox,
  ResourceExhaustedError,
  SandboxNotFoundError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { archiveEnd, decodeArchive, encodeHeader, type Header, padding } from "../../src/tar.js";
import { type Behavior, drop, errorReply, events, ok, Stub } from "../stub.js";

let stub: Stub;
let sandbox: PythonSandbox;
let root: string;
/** Where downloads go. Everything else in root must stay as it is. */
let target: string;

beforeEach(async () => {
  stub = await Stub.start();
  sandbox = await PythonSandbox.create({ ...stub.access, name: "my-env", namespace: "team" });
  stub.sent.length = 0;
  root = mkdtempSync(join(tmpdir(), "msb-unit-"));
  target = join(root, "target");
});

afterEach(async () => {
  rmSync(root, { recursive: true });
  await stub[Symbol.asyncDispose]();
});

const info = { path: "/tmp/a", type: "file", size: 3, mode: "0640" };
const directory = { path: "/tmp/a", type: "directory", size: 0, mode: "0755" };

/** Sends bytes in pieces of an odd size. */
function sends(bytes: Buffer): Behavior {
  return async (_, response) => {
    for (let i = 0; i < bytes.length; i += 700) {
      await new Promise((resolve) => response.write(bytes.subarray(i, i + 700), resolve));
    }
    response.end();
  };
}

/** Returns the bytes of an archive. */
function archive(...entries: (Partial<Header> & { content?: string })[]): Buffer {
  const parts = entries.flatMap(({ content = "", ...header }) => {
    const size = Buffer.byteLength(content);
    const rest: Header = { name: "", type: "file", mode: 0o644, size, modified: 1, linkName: "", ...header };
    return [encodeHeader(rest), Buffer.from(content), padding(size)];
  });
  return Buffer.concat([...parts, archiveEnd]);
}

async function download(bytes: Buffer): Promise<void> {
  stub.answer("sandbox.fs.stat", ok(directory));
  stub.answer("GET files", sends(bytes));
  await sandbox.files.download("/tmp/a", target);
}

describe("files", () => {
  test("send the right requests", async () => {
    const answers: Record<string, unknown> = {
      "fs.list": { entries: [info] },
      "fs.stat": info,
      "fs.exists": { exists: true },
      "fs.mkdir": directory,
      "fs.move": info,
      "fs.remove": {},
    };
    for (const [method, result] of Object.entries(answers)) stub.answer(`sandbox.${method}`, ok(result));
    const { files } = sandbox;
    expect(await files.list("/tmp", { depth: 2 })).toEqual([info]);
    expect(await files.stat("/tmp/a")).toEqual(info);
    expect(await files.exists("a")).toBe(true);
    await files.mkdir("b", { mode: "0700", user: "nobody" });
    await files.move("a", "b");
    await files.remove("b", { recursive: true });
    const sandboxParams = { sandbox: "my-env", namespace: "team" };
    expect(stub.sent.map(({ params }) => params)).toEqual([
      { ...sandboxParams, path: "/tmp", depth: 2 },
      { ...sandboxParams, path: "/tmp/a" },
      { ...sandboxParams, path: "a" },
      { ...sandboxParams, path: "b", mode: "0700", user: "nobody" },
      { ...sandboxParams, from: "a", to: "b" },
      { ...sandboxParams, path: "b", recursive: true },
    ]);
  });

  test("are read and written", async () => {
    const odd = "/tmp/ a&b?c=d%#\n'\"é";
    stub.answer("GET files", sends(Buffer.from("\ufeffé")));
    stub.answer("PUT files", { status: 201, body: JSON.stringify(info) });
    expect(await sandbox.files.read(odd)).toBe("\ufeffé");
    expect(await sandbox.files.write(odd, "é", { mode: "0755", user: "nobody" })).toEqual(info);
    const pieces = async function* () {
      yield Buffer.from("a");
      yield new Uint8Array([0xff]);
    };
    await sandbox.files.write("b", pieces());
    await sandbox.files.write("c", new Uint8Array([0xfe]));
    expect(stub.sent.map(({ method, params, body }) => [method, params, body.toString("latin1")])).toEqual([
      ["GET files", { path: odd, namespace: "team" }, ""],
      ["PUT files", { path: odd, namespace: "team", mode: "0755", user: "nobody" }, "\xc3\xa9"],
      ["PUT files", { path: "b", namespace: "team" }, "a\xff"],
      ["PUT files", { path: "c", namespace: "team" }, "\xfe"],
    ]);
    for (const { headers } of stub.sent) expect(headers.authorization).toBe(`Bearer ${stub.access.apiKey}`);
    stub.answer("GET files", sends(Buffer.from([0xff])));
    await expect(sandbox.files.read("a")).rejects.toThrow(ConflictError);
    // A file may look like an error.
    const body = '{"error":{"code":-32003,"message":"no"}}';
    stub.answer("GET files", { status: 200, body });
    expect(await sandbox.files.read("a")).toBe(body);
  });

  test("have errors, also while a body is being sent", async () => {
    stub.answer("GET files", errorReply(404, -32003));
    stub.answer("PUT files", errorReply(403, -32004));
    await expect(sandbox.files.read("a")).rejects.toThrow(SandboxNotFoundError);
    await expect(sandbox.files.write("a", "b")).rejects.toThrow(PermissionDeniedError);
    const reason = new Error("the program cannot go on");
    const pieces = async function* () {
      yield Buffer.from("a");
      throw reason;
    };
    await expect(sandbox.files.write("a", pieces())).rejects.toBe(reason);
    // A refused upload ends, although the program has more to send.
    let ended = false;
    const endless = async function* () {
      try {
        for (;;) yield Buffer.alloc(1 << 16);
      } finally {
        ended = true;
      }
    };
    stub.http.removeAllListeners("request").once("request", (_, response) => {
      response.writeHead(429, { "Content-Type": "application/json" }).end(errorReply(429, -32006).body);
    });
    await expect(sandbox.files.write("a", endless())).rejects.toThrow(ResourceExhaustedError);
    await vi.waitUntil(() => ended);
  });

  test("that break off are not complete", async () => {
    stub.answer("GET files", (request, response) => {
      response.setHeader("Content-Length", 10).write("abc", () => request.socket.destroy());
    });
    await expect(sandbox.files.read("a")).rejects.toThrow(ConnectionLostError);
  });

  test("are sent again if the connection was lost, unless their content is gone", async () => {
    stub.answer("PUT files", drop, { status: 200, body: JSON.stringify(info) });
    expect(await sandbox.files.write("a", "b")).toEqual(info);
    stub.answer("PUT files", drop, { status: 200, body: JSON.stringify(info) });
    const pieces = async function* () {
      yield Buffer.from("a");
    };
    await expect(sandbox.files.write("a", pieces())).rejects.toThrow(ConnectionLostError);
  });

  test("are watched until the watcher is closed", async () => {
    const changes = [
      { type: "create", path: "a" },
      { type: "overflow", path: "" },
    ];
    const gone: [string, unknown] = ["error", { code: -32003, message: "the directory was removed" }];
    stub.answer(
      "sandbox.fs.watch",
      events(["started", {}], ...changes.map((change): [string, unknown] => ["change", change]), gone),
      errorReply(404, -32003),
    );
    const seen: unknown[] = [];
    const watch = async () => {
      for await (const change of await sandbox.files.watch("/tmp", { recursive: true })) seen.push(change);
    };
    await expect(watch()).rejects.toThrow("the directory was removed");
    expect(seen).toEqual(changes);
    await expect(watch()).rejects.toThrow(SandboxNotFoundError);
    stub.answer("sandbox.fs.watch", (_, response) => {
      response.setHeader("Content-Type", "text/event-stream").write("event: started\ndata: {}\n\n");
    });
    const controller = new AbortController();
    const watcher = await sandbox.files.watch("/tmp", controller);
    const next = watcher[Symbol.asyncIterator]().next();
    await watcher[Symbol.asyncDispose]();
    expect(await next).toEqual({ value: undefined, done: true });
    const other = (await sandbox.files.watch("/tmp", controller))[Symbol.asyncIterator]().next();
    controller.abort();
    await expect(other).rejects.toMatchObject({ name: "AbortError" });
  });
});

describe("transfers", () => {
  test("of a file report progress, and leave nothing behind if they fail", async () => {
    mkdirSync(target);
    const file = join(target, "file");
    writeFileSync(file, "abc", { mode: 0o750 });
    stub.answer("PUT files", { status: 201, body: JSON.stringify(info) });
    const progress: number[] = [];
    await sandbox.files.upload(file, "/tmp/a", { onProgress: (bytes) => progress.push(bytes) });
    expect(stub.sent[0]).toMatchObject({ params: { path: "/tmp/a", mode: "0750" }, body: Buffer.from("abc") });
    expect(progress).toEqual([3]);
    stub.answer("sandbox.fs.stat", ok(info));
    stub.answer("GET files", sends(Buffer.from("new")));
    await sandbox.files.download("/tmp/a", file);
    expect(readFileSync(file, "utf8")).toBe("new");
    expect(statSync(file).mode & 0o777).toBe(0o640);
    stub.answer("GET files", (request, response) => {
      response.setHeader("Content-Length", 10).write("abc", () => request.socket.destroy());
    });
    await expect(sandbox.files.download("/tmp/a", file)).rejects.toThrow(ConnectionLostError);
    expect(readFileSync(file, "utf8")).toBe("new");
    expect(readdirSync(target)).toEqual(["file"]);
    await expect(sandbox.files.upload(join(target, "no"), "a")).rejects.toThrow("ENOENT");
  });

  test("of a tree arrive as they were sent", async () => {
    const long = "é".repeat(120);
    mkdirSync(join(root, "tree", long), { recursive: true });
    writeFileSync(join(root, "tree", long, long), "x".repeat(5000));
    writeFileSync(join(root, "tree/empty"), "");
    symlinkSync(long, join(root, "tree/link"));
    stub.answer("PUT files", { status: 200, body: '{"entries":4}' });
    await sandbox.files.upload(join(root, "tree"), "/tmp/a", { user: "nobody" });
    const [{ params, headers, body } = { params: {}, headers: {}, body: Buffer.alloc(0) }] = stub.sent;
    expect(params).toEqual({ path: "/tmp/a", user: "nobody", namespace: "team" });
    expect(headers["content-type"]).toBe("application/x-tar");
    await download(body);
    expect(stub.sent.at(-1)?.headers.accept).toBe("application/x-tar");
    expect(readdirSync(target).sort()).toEqual(["empty", "link", long]);
    expect(readFileSync(join(target, long, long), "utf8")).toBe("x".repeat(5000));
  });

  test.each<[string, Partial<Header> & { content?: string }]>([
    ["an absolute path", { name: "/ROOT/outside", content: "x" }],
    ["a path with ..", { name: "a/../../outside", content: "x" }],
    ["a directory with ..", { name: "../outside/", type: "directory" }],
    ["a path with a zero byte", { name: `a\0${"b".repeat(100)}`, content: "x" }],
    ["a path through a link", { name: "existing-link/outside", content: "x" }],
    ["a directory in place of a link", { name: "existing-link/", type: "directory" }],
    ["an absolute link", { name: "link", type: "symlink", linkName: "/ROOT" }],
    ["a link out of the directory", { name: "link", type: "symlink", linkName: "../secret" }],
    ["a link out of a directory below", { name: "a/link", type: "symlink", linkName: "../../secret" }],
    ["a link through another link", { name: "link", type: "symlink", linkName: "a/b/../../.." }],
    ["a hard link out of the directory", { name: "link", type: "link", linkName: "../secret" }],
    ["a hard link through a link", { name: "link", type: "link", linkName: "existing-link/secret" }],
    ["a hard link to a link", { name: "link", type: "link", linkName: "existing-link" }],
    ["a hard link to itself", { name: "existing", type: "link", linkName: "existing" }],
    ["a file without a name", { name: "./", content: "x" }],
    ["a file in place of a directory", { name: "directory", content: "x" }],
  ])("refuse %s, and write nothing outside", async (_, { name = "", linkName = "", ...entry }) => {
    mkdirSync(join(target, "directory"), { recursive: true });
    writeFileSync(join(target, "existing"), "x");
    writeFileSync(join(root, "secret"), "unchanged");
    symlinkSync("..", join(target, "existing-link"));
    const inRoot = (path: string) => path.replace("/ROOT", root);
    const hostile = { ...entry, name: inRoot(name), linkName: inRoot(linkName) };
    const error = await download(archive(hostile)).then(
      () => expect.unreachable(),
      (error: unknown) => error,
    );
    expect(error).toBeInstanceOf(UnexpectedAnswerError);
    expect((error as Error).message).toContain("the download ends, because");
    expect(readdirSync(root).sort()).toEqual(["secret", "target"]);
    expect(readFileSync(join(root, "secret"), "utf8")).toBe("unchanged");
    expect(readdirSync(target).filter((name) => name.includes("link"))).toEqual(["existing-link"]);
  });

  test("replace links instead of following them, and drop special permissions", async () => {
    mkdirSync(target);
    writeFileSync(join(root, "secret"), "unchanged");
    symlinkSync("../secret", join(target, "file"));
    await download(
      archive(
        { name: "file", content: "new", mode: 0o6755 },
        { name: "link", type: "symlink", linkName: "file" },
        { name: "link", content: "newer" },
        { name: "hard", type: "link", linkName: "file" },
        { name: "hard", content: "newest" },
      ),
    );
    expect(readFileSync(join(root, "secret"), "utf8")).toBe("unchanged");
    expect(lstatSync(join(target, "file")).mode & 0o7777).toBe(0o755);
    const contents = ["file", "link", "hard"].map((name) => readFileSync(join(target, name), "utf8"));
    expect(contents).toEqual(["new", "newer", "newest"]);
  });

  test("a chain of links does not lead out of the directory", async () => {
    // Each link alone seems to stay inside: deep leads to shallow, and link goes two directories up from there.
    const chain = archive(
      { name: "shallow/", type: "directory" },
      { name: "a/b/deep", type: "symlink", linkName: "../../shallow" },
      { name: "link", type: "symlink", linkName: "a/b/deep/../.." },
    );
    await expect(download(chain)).rejects.toThrow('"link" is a symbolic link to "a/b/deep/../.."');
  });
});

describe("archives", () => {
  const complete = archive({ name: "file", content: "x".repeat(600) });
  const changed = (change: (bytes: Buffer) => void) => {
    const bytes = Buffer.from(complete);
    change(bytes);
    return bytes;
  };
  const makeDevice = (bytes: Buffer) => {
    const sum = Number.parseInt(bytes.toString("latin1", 148, 154), 8) + 3; // instead of the type 0
    bytes.write("3", 156);
    bytes.write(sum.toString(8).padStart(6, "0"), 148);
  };
  test.each([
    ["that end early", complete.subarray(0, 700), "it is not complete"],
    ["without an end", complete.subarray(0, -1024), "it is not complete"],
    ["that are empty", Buffer.alloc(0), "it is not complete"],
    ["that are text", Buffer.from("<html>".repeat(100)), "wrong"],
    ["with a wrong checksum", changed((bytes) => bytes.write("g", 0)), "checksum"],
    ["with a device", changed(makeDevice), 'an entry of the type "3"'],
  ])("%s are refused", async (_, bytes, says) => {
    const error = download(bytes);
    await expect(error).rejects.toThrow(UnexpectedAnswerError);
    await expect(error).rejects.toThrow(says);
  });

  test("with large sizes and old times are encoded", async () => {
    const size = 9 * 2 ** 30;
    const header = encodeHeader({ name: "a", type: "file", mode: 0o644, size, modified: -5, linkName: "" });
    const source = (async function* () {
      yield header;
    })();
    const { value } = await decodeArchive(source).next();
    expect(value).toMatchObject({ name: "a", size, modified: 0 });
  });
});
