import { afterEach, beforeEach, expect, test, vi } from "vitest";
import {
  BaseSandbox,
  ConfigError,
  InvalidParamsError,
  listSandboxes,
  NotStartedError,
  PythonSandbox,
  SandboxNotFoundError,
  SandboxOptions,
  UnavailableError,
  UnexpectedAnswerError,
} from "../../src/index.js";
import { ok, errorReply, info, Stub } from "../stub.js";

let stub: Stub;

beforeEach(async () => {
  stub = await Stub.start();
});

afterEach(() => stub[Symbol.asyncDispose]());

const notStarted = "Sandbox is not started. Call start() first.";

test("start, run and stop", async () => {
  const sandbox = new PythonSandbox({ ...stub.access, name: "my-env" });
  expect(sandbox.isStarted).toBe(false);
  expect(sandbox.name).toBe("my-env");
  expect(sandbox.serverUrl).toBe(stub.url);
  expect(sandbox.namespace).toBeUndefined();
  await expect(sandbox.run("1")).rejects.toThrow(new NotStartedError(notStarted));
  await expect(sandbox.command.run("true")).rejects.toThrow(NotStartedError);
  await expect(sandbox.metrics.all()).rejects.toThrow(NotStartedError);
  await sandbox.stop(); // nothing to stop
  await sandbox.start();
  await sandbox.start(); // has no effect
  expect(sandbox.isStarted).toBe(true);
  expect((await sandbox.run("6 * 7")).stdout).toBe("42");
  expect((await sandbox.command.run("sh")).exitCode).toBe(3);
  await sandbox.stop();
  await sandbox.stop();
  expect(sandbox.isStarted).toBe(false);
  await expect(sandbox.run("1")).rejects.toThrow(NotStartedError);
  await sandbox.start(); // again
  expect(stub.called).toEqual([
    "sandbox.start",
    "sandbox.repl.run",
    "sandbox.command.run",
    "sandbox.stop",
    "sandbox.start",
  ]);
});

test("a name is generated", () => {
  const name = new PythonSandbox(stub.access).name;
  expect(name).toMatch(/^sandbox-[0-9a-f]{8}$/);
  expect(new PythonSandbox(stub.access).name).not.toBe(name);
});

test("await using stops the sandbox at the end of the block", async () => {
  {
    await using sandbox = await PythonSandbox.create(stub.access);
    expect(sandbox.isStarted).toBe(true);
  }
  expect(stub.called).toEqual(["sandbox.start", "sandbox.stop"]);
});

test("await using ignores that the sandbox does not exist, but no other error", async () => {
  stub.answer("sandbox.stop", errorReply(404, -32003));
  {
    await using sandbox = await PythonSandbox.create(stub.access);
    void sandbox;
  }
  stub.answer("sandbox.stop", errorReply(500, -32603));
  const sandbox = await PythonSandbox.create(stub.access);
  await expect(sandbox[Symbol.asyncDispose]()).rejects.toThrow("it is so");
});

test("a failed stop can be repeated, unless the sandbox does not exist", async () => {
  const sandbox = await PythonSandbox.create(stub.access);
  stub.answer("sandbox.stop", errorReply(503, -32009), errorReply(404, -32003));
  await expect(sandbox.stop()).rejects.toThrow(UnavailableError);
  expect(sandbox.isStarted).toBe(true);
  await expect(sandbox.stop()).rejects.toThrow(SandboxNotFoundError);
  expect(sandbox.isStarted).toBe(false);
});

test("after a failed start, the sandbox is not started", async () => {
  stub.answer("sandbox.start", errorReply(409, -32005), ok("started"));
  const sandbox = new PythonSandbox(stub.access);
  await expect(sandbox.start()).rejects.toThrow("it is so");
  expect(sandbox.isStarted).toBe(false);
  await sandbox.start();
  expect(sandbox.isStarted).toBe(true);
});

test("start takes missing options from the constructor, and accepts options by position", async () => {
  const sandbox = new PythonSandbox({ ...stub.access, image: "a", memory: 1, cpus: 1, envs: ["A=1"] });
  await sandbox.start({ memory: 2, cpus: undefined });
  await sandbox.stop();
  await sandbox.start(undefined, 3, 2.4);
  await sandbox.stop();
  await sandbox.start("b");
  const configs = stub.sent.filter(({ method }) => method === "sandbox.start").map(({ params }) => params.config);
  expect(configs).toEqual([
    { image: "a", memory: 2, cpus: 1, envs: ["A=1"] },
    { image: "a", memory: 3, cpus: 2, envs: ["A=1"] },
    { image: "b", memory: 1, cpus: 1, envs: ["A=1"] },
  ]);
});

test("the builder collects all options", () => {
  const signal = AbortSignal.timeout(1000);
  const options = SandboxOptions.builder()
    .serverUrl("http://127.0.0.1:1")
    .namespace("team")
    .name("my-env")
    .apiKey("msb_a")
    .image("i")
    .memory(1)
    .cpus(2)
    .envs({ A: "1" })
    .workdir("/w")
    .disk(64)
    .user("app")
    .hostname("web")
    .volumes(["/a:/b"])
    .ports(["80:80"])
    .dependsOn(["db"])
    .shell("/bin/sh")
    .scripts({ start: "true" })
    .exec("true")
    .timeout(3)
    .signal(signal)
    .build();
  expect(options).toEqual({
    serverUrl: "http://127.0.0.1:1",
    namespace: "team",
    name: "my-env",
    apiKey: "msb_a",
    image: "i",
    memory: 1,
    cpus: 2,
    envs: { A: "1" },
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
    timeout: 3,
    signal,
  });
});

test("later calls of a builder do not change options that it has built", () => {
  const builder = SandboxOptions.builder().name("a");
  const options = builder.build();
  expect(builder.name("b").build().name).toBe("b");
  expect(options.name).toBe("a");
});

test("create of a subclass creates an object of the subclass, and works as a bare function", async () => {
  class Subclass extends PythonSandbox {
    override async getDefaultImage(): Promise<string> {
      return "custom";
    }
  }
  expect(await Subclass.create(stub.access)).toBeInstanceOf(Subclass);
  expect(stub.sent[0]?.params.config).toEqual({ image: "custom" });
  const { create } = PythonSandbox;
  const holder = { create };
  expect(await create(stub.access)).toBeInstanceOf(PythonSandbox);
  expect(await holder.create(stub.access)).toBeInstanceOf(PythonSandbox);
  expect(new Subclass(stub.access)).toBeInstanceOf(BaseSandbox);
});

test("individual metrics", async () => {
  const { metrics } = await PythonSandbox.create(stub.access);
  expect(await metrics.cpu()).toBe(12.5);
  expect(await metrics.memory()).toBe(256);
  expect(await metrics.disk()).toBe(1099511627776);
  expect(await metrics.isRunning()).toBe(true);
  const idle = {
    namespace: "default",
    name: "a",
    running: false,
    cpu_usage: null,
    memory_usage: null,
    disk_usage: null,
  };
  stub.answer("sandbox.metrics.get", ok({ sandboxes: [idle] }));
  expect(await metrics.all()).toEqual(idle);
  expect(await metrics.cpu()).toBeUndefined();
  expect(await metrics.memory()).toBeUndefined();
  expect(await metrics.disk()).toBeUndefined();
  expect(await metrics.isRunning()).toBe(false);
  for (const notFound of [ok({ sandboxes: [] }), errorReply(404, -32003)]) {
    stub.answer("sandbox.metrics.get", notFound);
    await expect(metrics.all()).rejects.toThrow(SandboxNotFoundError);
    expect(await metrics.isRunning()).toBe(false);
  }
});

test("info describes the sandbox, even if another program started it", async () => {
  const sandbox = new PythonSandbox({ ...stub.access, name: "my-env", namespace: "team" });
  expect(await sandbox.info()).toEqual(info);
  expect(sandbox.isStarted).toBe(false);
  stub.answer("sandbox.get", errorReply(404, -32003));
  await expect(sandbox.info()).rejects.toThrow(SandboxNotFoundError);
  expect(stub.sent.map(({ params }) => params)).toEqual(Array(2).fill({ sandbox: "my-env", namespace: "team" }));
});

test("all pages of the list are fetched", async () => {
  expect(await listSandboxes(stub.access)).toEqual([info]);
  const [a, b, c] = ["a", "b", "c"].map((name) => ({ ...info, name }));
  // The last page repeats, as no real server does.
  stub.answer("sandbox.list", ok({ sandboxes: [a, b], next: "default/b" }), ok({ sandboxes: [c], next: "default/c" }));
  expect(await listSandboxes({ ...stub.access, namespace: "*" })).toEqual([a, b, c, c]);
  expect(stub.sent.map(({ params }) => params)).toEqual([
    {},
    { namespace: "*" },
    { namespace: "*", after: "default/b" },
    { namespace: "*", after: "default/c" },
  ]);
});

test("an empty option is not taken for a missing one", async () => {
  vi.stubEnv("MSB_API_KEY", stub.access.apiKey);
  vi.stubEnv("MSB_SERVER_URL", stub.url);
  for (const option of ["apiKey", "serverUrl"]) {
    for (const value of ["", " \n"]) {
      expect(() => new PythonSandbox({ [option]: value })).toThrow(
        new ConfigError(`${option} is empty: give a value, or leave it out to use the environment or a .env file`),
      );
      await expect(listSandboxes({ [option]: value })).rejects.toThrow(ConfigError);
    }
  }
  for (const option of ["name", "namespace", "image"]) {
    const error = new InvalidParamsError(`${option} is empty: give a ${option}, or leave it out`);
    await expect(PythonSandbox.create({ [option]: "" })).rejects.toThrow(error);
  }
  await expect(listSandboxes({ namespace: "" })).rejects.toThrow(InvalidParamsError);
  vi.unstubAllEnvs();
  expect(stub.called).toEqual([]);
});

test("arguments of the wrong type are refused, and not ignored or taken apart", async () => {
  const wrong = (value: unknown) => value as never;
  expect(() => new PythonSandbox(wrong("my-env"))).toThrow("the options must be an object, such as");
  await expect(PythonSandbox.create({ ...stub.access, envs: wrong("A=1") })).rejects.toThrow('not the string "A=1"');
  await expect(PythonSandbox.create({ ...stub.access, envs: wrong({ A: null }) })).rejects.toThrow("A has no value");
  const sandbox = await PythonSandbox.create(stub.access);
  await expect(sandbox.run("1", wrong(5))).rejects.toThrow("the options must be an object, such as");
  await expect(listSandboxes(wrong("team"))).rejects.toThrow(InvalidParamsError);
  expect(stub.called).toEqual(["sandbox.start"]);
});

test.each([null, [], "text", {}, { output: "text" }, { sandboxes: null }])(
  "the result %j is refused",
  async (result) => {
    const sandbox = await PythonSandbox.create(stub.access);
    for (const method of [
      "sandbox.repl.run",
      "sandbox.command.run",
      "sandbox.metrics.get",
      "sandbox.list",
      "sandbox.get",
    ])
      stub.answer(method, ok(result));
    await expect(sandbox.run("1")).rejects.toThrow(UnexpectedAnswerError);
    await expect(sandbox.command.run("true")).rejects.toThrow(UnexpectedAnswerError);
    await expect(sandbox.metrics.all()).rejects.toThrow(UnexpectedAnswerError);
    await expect(sandbox.info()).rejects.toThrow(UnexpectedAnswerError);
    await expect(listSandboxes(stub.access)).rejects.toThrow(UnexpectedAnswerError);
  },
);

test.each([-1, Number.NaN, "5" as never])("the timeout %s is refused before anything is sent", async (timeout) => {
  await expect(PythonSandbox.create({ ...stub.access, timeout })).rejects.toThrow(InvalidParamsError);
  const sandbox = await PythonSandbox.create(stub.access);
  await expect(sandbox.run("1", { timeout })).rejects.toThrow(InvalidParamsError);
  await expect(sandbox.command.run("ls", [], { timeout })).rejects.toThrow(InvalidParamsError);
  expect(stub.called).toEqual(["sandbox.start"]);
});

test("the key and the server are read from the environment", async () => {
  vi.stubEnv("MSB_SERVER_URL", stub.url);
  vi.stubEnv("MSB_API_KEY", stub.access.apiKey);
  const sandbox = await PythonSandbox.create();
  vi.unstubAllEnvs();
  expect(sandbox.serverUrl).toBe(stub.url);
  expect(sandbox.apiKey).toBe(stub.access.apiKey);
  expect(stub.sent[0]?.headers.authorization).toBe(`Bearer ${stub.access.apiKey}`);
});
