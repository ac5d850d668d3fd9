import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { get } from "node:http";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  ConflictError,
  type FileChange,
  PythonSandbox,
  SandboxNotFoundError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { access, failure, newName } from "./server.js";

let sandbox: PythonSandbox;
let local: string;

beforeAll(async () => {
  sandbox = await PythonSandbox.create({ ...access, name: newName(), workdir: "/tmp" });
});

afterAll(() => sandbox?.stop());

beforeEach(() => {
  local = mkdtempSync(join(tmpdir(), "msb-files-"));
});

afterEach(() => rmSync(local, { recursive: true }));

/** Runs a shell command line in the sandbox, and returns its output. */
async function sh(line: string): Promise<string> {
  return (await sandbox.command.run("sh", ["-c", line])).raiseForStatus().stdout;
}

describe("files", () => {
  test("are written and read, as text, bytes and streams", async () => {
    const text = "é\u{1f600}\r\n\0\ufeff";
    const info = await sandbox.files.write("notes/hello.txt", text, { mode: "0600", user: "nobody" });
    expect(info).toMatchObject({ path: "/tmp/notes/hello.txt", type: "file", mode: "0600", user: "nobody" });
    expect(await sandbox.files.read("notes/hello.txt")).toBe(text);
    const bytes = Uint8Array.from({ length: 3 << 20 }, (_, i) => i * 31);
    const pieces = async function* () {
      for (let i = 0; i < bytes.length; i += 100_000) yield bytes.subarray(i, i + 100_000);
    };
    const odd = "/tmp/notes/ a&b?c=d%#\n'\"é";
    expect(await sandbox.files.write(odd, pieces())).toMatchObject({ size: bytes.length });
    expect(Buffer.from(bytes).equals(await sandbox.files.read(odd, { format: "bytes" }))).toBe(true);
    let size = 0;
    for await (const piece of await sandbox.files.read(odd, { format: "stream" })) size += piece.length;
    expect(size).toBe(bytes.length);
    const error = await failure(sandbox.files.read(odd));
    expect(error).toBeInstanceOf(ConflictError);
    expect((error as Error).message).toContain("is not valid UTF-8");
    expect(await failure(sandbox.files.read("/no-such-file"))).toBeInstanceOf(SandboxNotFoundError);
    expect(await failure(sandbox.files.read("/tmp"))).toBeInstanceOf(ConflictError);
  });

  test("are listed, described, moved and removed", async () => {
    expect(await sandbox.files.mkdir("/tmp/a/b", { mode: "0700" })).toMatchObject({ type: "directory", mode: "0700" });
    await sandbox.files.write("/tmp/a/b/file", "1");
    await sh("ln -s b/file /tmp/a/link");
    const names = async (depth?: number) => (await sandbox.files.list("/tmp/a", { depth })).map(({ path }) => path);
    expect(await names()).toEqual(["/tmp/a/b", "/tmp/a/link"]);
    expect(await names(2)).toEqual(["/tmp/a/b", "/tmp/a/b/file", "/tmp/a/link"]);
    expect(await sandbox.files.stat("/tmp/a/link")).toMatchObject({
      type: "symlink",
      link_target: "b/file",
      target: { path: "/tmp/a/b/file", size: 1 },
    });
    expect(await sandbox.files.move("/tmp/a/b/file", "/tmp/a/c/file")).toMatchObject({ path: "/tmp/a/c/file" });
    expect(await sandbox.files.exists("/tmp/a/b/file")).toBe(false);
    expect(await sandbox.files.exists("/tmp/a/link")).toBe(true);
    expect(await failure(sandbox.files.remove("/tmp/a"))).toBeInstanceOf(ConflictError);
    await sandbox.files.remove("/tmp/a", { recursive: true });
    expect(await failure(sandbox.files.stat("/tmp/a"))).toBeInstanceOf(SandboxNotFoundError);
  });

  test("are watched", async () => {
    await sandbox.files.mkdir("/tmp/watched/sub");
    await using watcher = await sandbox.files.watch("/tmp/watched", { recursive: true });
    await sh("echo 1 >/tmp/watched/sub/file; rm /tmp/watched/sub/file; mkdir /tmp/watched/last");
    const changes: FileChange[] = [];
    for await (const change of watcher) {
      changes.push(change);
      if (change.path === "last") break;
    }
    expect(changes[0]).toMatchObject({ type: "create", path: "sub/file" });
    expect(changes.map(({ type, path }) => `${type} ${path}`)).toContain("remove sub/file");
    // Closing ends an iteration that waits.
    const other = await sandbox.files.watch("/tmp/watched");
    const seen = other[Symbol.asyncIterator]().next();
    other.close();
    expect((await seen).done).toBe(true);
    expect(await failure(sandbox.files.watch("/no-such-directory"))).toBeInstanceOf(SandboxNotFoundError);
  });
});

describe("transfers", () => {
  test("of a file keep its content and mode, and report progress", async () => {
    const bytes = Buffer.from(Uint8Array.from({ length: 2 << 20 }, (_, i) => i * 17));
    writeFileSync(join(local, "file"), bytes);
    chmodSync(join(local, "file"), 0o750);
    const sent: number[] = [];
    const received: number[] = [];
    await sandbox.files.upload(join(local, "file"), "/tmp/up/file", {
      onProgress: (n) => sent.push(n),
      user: "nobody",
    });
    expect(await sandbox.files.stat("/tmp/up/file")).toMatchObject({ mode: "0750", user: "nobody" });
    await sandbox.files.download("/tmp/up/file", join(local, "copy"), { onProgress: (n) => received.push(n) });
    expect(readFileSync(join(local, "copy")).equals(bytes)).toBe(true);
    expect(statSync(join(local, "copy")).mode & 0o777).toBe(0o750);
    for (const numbers of [sent, received]) {
      expect(numbers.length).toBeGreaterThan(1);
      expect(numbers.at(-1)).toBe(bytes.length);
    }
    expect(await failure(sandbox.files.download("/no-such-file", join(local, "x")))).toBeInstanceOf(
      SandboxNotFoundError,
    );
    expect(readdirSync(local).sort()).toEqual(["copy", "file"]);
  });

  test("of a tree keep links, modes, times and odd names", async () => {
    const tree = join(local, "tree");
    const long = "n".repeat(200);
    mkdirSync(join(tree, "dir/empty"), { recursive: true });
    mkdirSync(join(tree, long, long), { recursive: true });
    const names = [
      "plain",
      "dir/read-only",
      `${long}/${long}/${long}`,
      "dir/ new\nline 'é\u{1f600}\" \\ -x",
      ".hidden",
    ];
    for (const name of names) writeFileSync(join(tree, name), `content of ${name}`);
    const notUtf8 = Buffer.concat([Buffer.from(`${tree}/dir/`), Buffer.from([0xff, 0xfe])]);
    writeFileSync(notUtf8, "bytes");
    writeFileSync(join(tree, "empty file"), "");
    chmodSync(join(tree, "plain"), 0o755);
    chmodSync(join(tree, "dir/read-only"), 0o400);
    chmodSync(join(tree, "dir/empty"), 0o500);
    symlinkSync("plain", join(tree, "link"));
    symlinkSync("../plain", join(tree, "dir/up"));
    symlinkSync(long, join(tree, "long link"));
    let sent = 0;
    await sandbox.files.upload(tree, "/tmp/tree", { onProgress: (n) => (sent = n) });
    expect(sent).toBeGreaterThan(10_000);
    expect(
      await sh("cat /tmp/tree/link; stat -c '%a %F' /tmp/tree/plain /tmp/tree/dir/empty; ls /tmp/tree/long*"),
    ).toBe(`content of plain755 regular file\n500 directory\n${long}`);
    await sh("ln /tmp/tree/plain /tmp/tree/hard; mkfifo /tmp/tree/pipe");
    await sandbox.files.download("/tmp/tree", join(local, "copy"));
    const copy = join(local, "copy");
    for (const name of names) expect(readFileSync(join(copy, name), "utf8")).toBe(`content of ${name}`);
    expect(readFileSync(Buffer.concat([Buffer.from(`${copy}/dir/`), Buffer.from([0xff, 0xfe])]), "utf8")).toBe("bytes");
    for (const name of ["plain", "dir/read-only", "dir/empty", "dir", "empty file"]) {
      const [before, after] = [statSync(join(tree, name)), statSync(join(copy, name))];
      expect([name, after.mode]).toEqual([name, before.mode]);
      expect(Math.floor(after.mtimeMs / 1000)).toBe(Math.floor(before.mtimeMs / 1000));
    }
    expect(readlinkSync(join(copy, "link"))).toBe("plain");
    expect(readlinkSync(join(copy, "dir/up"))).toBe("../plain");
    expect(readlinkSync(join(copy, "long link"))).toBe(long);
    expect(statSync(join(copy, "hard")).ino).toBe(statSync(join(copy, "plain")).ino);
    expect(existsSync(join(copy, "pipe"))).toBe(false);
    // A second download replaces the files.
    writeFileSync(join(copy, "plain"), "old");
    await sandbox.files.download("/tmp/tree", copy);
    expect(readFileSync(join(copy, "plain"), "utf8")).toBe("content of plain");
  });

  test("do not create links that lead out of the directory", async () => {
    await sh("mkdir -p /tmp/leads; ln -s /etc/passwd /tmp/leads/out");
    const error = await failure(sandbox.files.download("/tmp/leads", join(local, "copy")));
    expect(error).toBeInstanceOf(UnexpectedAnswerError);
    expect((error as Error).message).toContain('"out" is a symbolic link to "/etc/passwd"');
    expect(() => lstatSync(join(local, "copy/out"))).toThrow("ENOENT");
  });
});

describe("forward", () => {
  test("connects to an HTTP server in the sandbox", async () => {
    const big = Buffer.from(Uint8Array.from({ length: 1 << 20 }, (_, i) => i * 13));
    await sandbox.files.write("/tmp/site/big", big);
    const ready = "import http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 8000), h.SimpleHTTPRequestHandler)";
    await using server = await sandbox.process.start(
      "python3",
      ["-uc", `${ready}; print("ready"); s.serve_forever()`],
      { cwd: "/tmp/site" },
    );
    for await (const { text } of server.output()) if (text.includes("ready")) break;
    const errors: unknown[] = [];
    await using forward = await sandbox.forward(8000, { onError: (error) => errors.push(error) });
    expect(forward.address).toBe(`127.0.0.1:${forward.localPort}`);
    const read = () =>
      new Promise<Buffer>((resolve, reject) => {
        get(`http://${forward.address}/big`, async (response) => {
          const pieces: Buffer[] = [];
          for await (const piece of response) pieces.push(piece);
          resolve(Buffer.concat(pieces));
        }).on("error", reject);
      });
    for (const body of await Promise.all([read(), read(), read()])) expect(body.equals(big)).toBe(true);
    expect(errors).toEqual([]);
  });

  test("reports a port on which nothing listens", async () => {
    let report = (_: unknown) => {};
    const reported = new Promise<unknown>((resolve) => (report = resolve));
    await using forward = await sandbox.forward(9, { onError: (error) => report(error) });
    const connection = connect(forward.localPort, "127.0.0.1").on("error", () => {});
    expect(await reported).toBeInstanceOf(SandboxNotFoundError);
    connection.destroy();
  });
});
