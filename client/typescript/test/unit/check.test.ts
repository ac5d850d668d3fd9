import { spawnSync } from "node:child_process";
import { chmodSync, copyFileSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, beforeEach, describe, expect, test } from "vitest";

let root: string;

beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "msb-check-"));
  copyFileSync(fileURLToPath(new URL("../../check.sh", import.meta.url)), join(root, "check.sh"));
  writeFileSync(join(root, "package-lock.json"), "{}");
  mkdirSync(join(root, "bin"));
  program("sleep", "");
});

afterEach(() => rmSync(root, { recursive: true }));

/** Creates a program that is first on the PATH. */
function program(name: string, text: string): void {
  const path = join(root, "bin", name);
  writeFileSync(path, `#!/bin/bash\n${text}\n`);
  chmodSync(path, 0o755);
}

function checkLint(): { status: number | null; stderr: string } {
  const env = { ...process.env, PATH: join(root, "bin") + delimiter + process.env.PATH, NODE_DIR: join(root, "node") };
  return spawnSync("bash", [join(root, "check.sh"), "lint"], { env, encoding: "utf8" });
}

/** Returns shell code that fails the given number of times. It counts the attempts in a file. */
const failing = (times: number) => `
cd "${root}"
echo x >>attempts
if [ "$(wc -l <attempts)" -le ${times} ]; then echo network error >&2; exit 1; fi`;

const failed = (...attempts: number[]) =>
  attempts.map((n) => expect.stringMatching(new RegExp(`^check.sh: attempt ${n} of 3 failed: .* (ci|install) `)));

describe.each([
  ["npm", (times: number) => program("npm", `if [ "$1" = ci ]; then ${failing(times)}\nmkdir -p node_modules; fi`)],
  [
    "pip",
    (times: number) => {
      program("node", "exit 1"); // too old
      program("npm", "mkdir -p node_modules");
      program("pip", `${failing(times)}\nln -s ../../bin/npm node/bin/npm; ln -s /bin/true node/bin/node`);
      program("python3", `mkdir -p "$3/bin" && ln -s "${root}/bin/pip" "$3/bin/pip"`);
    },
  ],
])("check.sh: an installation from the network with %s", (_, prepare) => {
  test("is tried up to three times, and failed attempts are printed", () => {
    prepare(2);
    const { status, stderr } = checkLint();
    expect(stderr.trim().split("\n")).toEqual(["network error", ...failed(1), "network error", ...failed(2)]);
    expect(status).toBe(0);
  });

  test("fails after three attempts", () => {
    prepare(9);
    const { status, stderr } = checkLint();
    expect(stderr.trim().split("\n")).toEqual([
      "network error",
      ...failed(1),
      "network error",
      ...failed(2),
      "network error",
      ...failed(3),
    ]);
    expect(status).toBe(1);
  });
});
