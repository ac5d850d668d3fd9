import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { errorsByCode, MicrosandboxError } from "../../src/errors.js";
import { InvalidParamsError, NodeSandbox, PythonSandbox, type SandboxOptions } from "../../src/index.js";
import { Server } from "../../src/server.js";
import { version } from "../../src/version.js";
import { Stub, testKey } from "../stub.js";

const sandboxParams = { sandbox: "my-env", namespace: "team" };

test("each call sends the right request", async () => {
  await using stub = await Stub.start();
  const python = new PythonSandbox({ ...stub.access, name: "my-env", namespace: "team" });
  const node = new NodeSandbox({ ...stub.access, name: "my-env" });
  await python.start();
  await node.start({
    image: "i",
    memory: 1024,
    cpus: 1.6,
    envs: { A: "1", B: "x=y" },
    workdir: "/w",
    disk: 64,
    user: "app",
    hostname: "web",
    volumes: ["/a:/b"],
    ports: ["80:80"],
    dependsOn: ["db"],
    shell: "/bin/sh",
    scripts: { start: "true" },
    exec: "true",
    timeout: 60,
  });
  await python.run("1");
  await python.run("1", { timeout: 1.5 });
  await python.run("1", { timeout: 0 });
  await python.run("1", { timeout: Infinity });
  await node.run("1");
  await python.command.run("ls");
  await python.command.run("ls", ["-l"], { timeout: 5 });
  await python.command.run("ls", ["-l"], 5);
  await python.metrics.all();
  await python.stop();
  expect(stub.sent.map(({ method, params }) => [method, params])).toEqual([
    ["sandbox.start", { ...sandboxParams, config: { image: "microsandbox/python" } }],
    [
      "sandbox.start",
      {
        sandbox: "my-env",
        config: {
          image: "i",
          memory: 1024,
          cpus: 2,
          envs: ["A=1", "B=x=y"],
          workdir: "/w",
          disk: 64,
          user: "app",
          hostname: "web",
          volumes: ["/a:/b"],
          ports: ["80:80"],
          depends_on: ["db"],
          shell: "/bin/sh",
          scripts: { start: "true" },
          exec: "true",
        },
      },
    ],
    ["sandbox.repl.run", { ...sandboxParams, language: "python", code: "1", results: true }],
    ["sandbox.repl.run", { ...sandboxParams, language: "python", code: "1", results: true, timeout: 1.5 }],
    ["sandbox.repl.run", { ...sandboxParams, language: "python", code: "1", results: true, timeout: 0 }],
    ["sandbox.repl.run", { ...sandboxParams, language: "python", code: "1", results: true }],
    ["sandbox.repl.run", { sandbox: "my-env", language: "nodejs", code: "1", results: true }],
    ["sandbox.command.run", { ...sandboxParams, command: "ls", args: [] }],
    ["sandbox.command.run", { ...sandboxParams, command: "ls", args: ["-l"], timeout: 5 }],
    ["sandbox.command.run", { ...sandboxParams, command: "ls", args: ["-l"], timeout: 5 }],
    ["sandbox.metrics.get", sandboxParams],
    ["sandbox.stop", sandboxParams],
  ]);
  for (const { headers } of stub.sent) {
    expect(headers.authorization).toBe(`Bearer ${testKey}`);
    expect(headers["user-agent"]).toBe(`microsandbox-js/${version}`);
  }
});

test("without a key, no Authorization header is sent", async () => {
  await using stub = await Stub.start();
  await PythonSandbox.create({ serverUrl: stub.url });
  expect(stub.sent[0]?.headers.authorization).toBeUndefined();
});

test("the path of the server's URL is kept", async () => {
  await using stub = await Stub.start();
  const paths: (string | undefined)[] = [];
  stub.http.prependListener("request", (request) => {
    paths.push(request.url);
    request.url = "/api/v1/rpc";
  });
  await PythonSandbox.create({ ...stub.access, serverUrl: `${stub.url}/msb/` });
  expect(paths).toEqual(["/msb/api/v1/rpc"]);
});

test("text is sent and received unchanged", async () => {
  await using stub = await Stub.start();
  const text = 'é\u{1f600}\u2028"\\\0';
  stub.answer("sandbox.repl.run", {
    status: 200,
    body: JSON.stringify({
      jsonrpc: "2.0",
      result: { status: "success", language: "python", output: [{ stream: "stdout", text }] },
      id: 1,
    }),
    headers: { "Content-Type": "Application/JSON; charset=utf-8" },
  });
  const sandbox = await PythonSandbox.create(stub.access);
  const { lines } = await sandbox.run(text);
  expect(lines).toEqual([{ stream: "stdout", text }]);
  expect(stub.sent[1]?.params.code).toBe(text);
});

/** An exchange of a golden transcript of the gateway. */
interface Exchange {
  method: string;
  params: Record<string, unknown>;
  status: number;
  body: string;
}

function transcript(name: string): Exchange[] {
  const path = new URL(`../../../../daemon/internal/serve/rpc/testdata/${name}`, import.meta.url);
  const exchanges = readFileSync(path, "utf8").matchAll(/^> (.*)\n< (\d+) (.*)$/gm);
  return [...exchanges].map(([, request = "", status, body = ""]) => {
    const { method, params = {} } = JSON.parse(request);
    return { method, params, status: Number(status), body };
  });
}

// The transcripts contain the responses of the real gateway.
test.each(["methods.txt", "errors.txt"])("every response in %s is parsed", async (name) => {
  const exchanges = transcript(name);
  expect(exchanges.length).toBeGreaterThan(10);
  await using stub = await Stub.start();
  const server = new Server({ serverUrl: stub.url, key: undefined });
  for (const { method, params, status, body } of exchanges) {
    stub.answer(method, { status, body });
    const { result, error } = JSON.parse(body);
    const answer = await server.call({ method, params }).catch((error: unknown) => error);
    if (status === 200) {
      expect(answer).toEqual(result);
    } else {
      expect(answer).toBeInstanceOf(MicrosandboxError);
      expect(answer).toMatchObject({ code: error.code, status, message: error.message, requestId: "REQUEST-ID" });
      expect((answer as object).constructor).toBe(errorsByCode.get(error.code));
    }
  }
  stub.violations.length = 0; // the transcripts also contain invalid requests
});

test("options that the server does not support are sent, so that it refuses them by name", async () => {
  const options: Record<string, SandboxOptions> = {
    volumes: { volumes: ["/etc:/etc"] },
    ports: { ports: ["80:80"] },
    depends_on: { dependsOn: ["y"] },
    shell: { shell: "/bin/sh" },
    scripts: { scripts: { start: "true" } },
    exec: { exec: "true" },
  };
  const refused = transcript("methods.txt").filter(({ body }) => body.includes("is not supported yet"));
  expect(refused.length).toBeGreaterThan(0);
  await using stub = await Stub.start();
  for (const { params, status, body } of refused) {
    const { message } = JSON.parse(body).error;
    const [, name = ""] = /^config\.(\w+) /.exec(message) ?? [];
    stub.answer("sandbox.start", { status, body });
    const error = await PythonSandbox.create({ ...stub.access, name: "x", ...options[name] }).catch((error) => error);
    expect(stub.sent.at(-1)?.params).toMatchObject(params);
    expect(error).toBeInstanceOf(InvalidParamsError);
    expect(error.message).toBe(message);
  }
});

test("the version is the one in package.json", () => {
  const text = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
  expect(version).toBe(JSON.parse(text).version);
});
