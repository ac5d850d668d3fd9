import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import * as source from "../../src/index.js";
import { Consumer } from "../consumer.js";
import { Stub } from "../stub.js";

let consumer: Consumer;

beforeAll(async () => {
  consumer = await Consumer.install({ fresh: true });
  consumer.copy(new URL("consumer", import.meta.url));
});

afterAll(() => consumer?.[Symbol.dispose]());

const strict = ["--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess", "--target", "es2022"];
const names = Object.keys(source).sort().join(" ");

test("the tarball contains only the needed files, and is small", () => {
  const others = consumer.files.filter((path) => !/^dist\/(esm|cjs)\/[\w-]+(\.d\.ts|\.js)$/.test(path));
  expect(others.sort()).toEqual(["LICENSE", "README.md", "dist/cjs/package.json", "package.json"]);
  expect(consumer.size).toBeLessThan(80_000);
});

test("its license is the license of the project", () => {
  const license = readFileSync(join(consumer.installed, "LICENSE"), "utf8");
  expect(license).toBe(readFileSync(new URL("../../../../LICENSE", import.meta.url), "utf8"));
  expect(license).toContain("Apache License\n");
});

describe.each([
  ["nodenext", "nodenext"],
  ["esnext", "bundler"],
])("types with --module %s", (module, resolution) => {
  // skipLibCheck is off, so that the package's own types are also checked.
  test.each([["es2022"], ["esnext,dom"]])("and --lib %s", async (lib) => {
    const programs = module === "nodenext" ? ["esm.mts", "original.cts"] : ["esm.mts"];
    const args = ["--module", module, "--moduleResolution", resolution, "--lib", lib, "--types", "node"];
    expect(await consumer.tsc(...strict, ...args, "--noEmit", ...programs)).toMatchObject({ stdout: "", code: 0 });
  });
});

test("an ES module imports it, and exits without process.exit", async () => {
  await using stub = await Stub.start();
  await consumer.tsc(...strict, "--module", "nodenext", "--types", "node", "esm.mts");
  const { access } = stub;
  const env = { MSB_SERVER_URL: access.serverUrl, MSB_API_KEY: access.apiKey };
  expect(await consumer.node("esm.mjs", [], env)).toEqual({
    stdout: `42 1 3 256\nNotStartedError false\n${names}\n`,
    stderr: "",
    code: 0,
  });
  expect(stub.called.at(-1)).toBe("sandbox.stop");
  expect(stub.sent[0]?.params).toEqual({
    sandbox: "my-env",
    config: { image: "microsandbox/python", volumes: [], envs: ["A=1"] },
  });
});

test("a CommonJS module requires it", async () => {
  expect(await consumer.node("cjs.cjs")).toEqual({ stdout: `${names}\nmicrosandbox\n`, stderr: "", code: 0 });
});

test("a program for the original SDK runs", async () => {
  await using stub = await Stub.start();
  await consumer.tsc(...strict, "--module", "nodenext", "--types", "node", "original.cts");
  const { stdout, stderr, code } = await consumer.node("original.cjs", [], { SERVER: stub.url });
  expect({ stderr, code }).toEqual({ stderr: "", code: 0 });
  expect(stdout.split("\n")).toEqual([
    "my-env default true msb_a true",
    "42  false success python",
    "hello no 3 false sh 2",
    "my-env true 12.5 12.5 256 1099511627776",
    "true",
    "Sandbox is not started. Call start() first.",
    "microsandbox/node true",
    "true",
    "",
  ]);
  // The options that the original accepted without sending them are also sent.
  expect(stub.sent.at(-1)?.params).toEqual({
    sandbox: "all",
    config: {
      image: "custom",
      envs: ["A=1"],
      workdir: "/w",
      volumes: ["/a:/b"],
      ports: ["80:80"],
      depends_on: ["my-env"],
      shell: "/bin/sh",
      scripts: { start: "true" },
      exec: "true",
    },
  });
  expect(stub.sent[0]?.params).toEqual({
    sandbox: "my-env",
    namespace: "default",
    config: { image: "microsandbox/python", memory: 1024, cpus: 2 },
  });
});
