import { chmodSync, chownSync, mkdirSync, mkdtempSync, realpathSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { loadConfig } from "../../src/config.js";
import { ConfigError } from "../../src/errors.js";
import { testKey } from "../stub.js";

const near = "project/sub/.env";
const far = "project/.env";
const theKey = `MSB_API_KEY='${testKey}'\n`;
const remote = "MSB_SERVER_URL=https://sandboxes.example.org\n";
const local = "MSB_SERVER_URL=http://127.0.0.1:7001\n";

const start = process.cwd();
let root: string;

beforeEach(() => {
  root = realpathSync(mkdtempSync(join(tmpdir(), "msb-config-")));
  mkdirSync(join(root, "project/sub"), { recursive: true });
  process.chdir(join(root, "project/sub"));
  vi.stubEnv("MSB_API_KEY", "");
  vi.stubEnv("MSB_SERVER_URL", "");
});

afterEach(() => {
  process.chdir(start);
  vi.unstubAllEnvs();
  rmSync(root, { recursive: true });
});

function write(name: string, text: string, mode = 0o600): string {
  const path = join(root, name);
  writeFileSync(path, text);
  chmodSync(path, mode);
  return path;
}

/** Returns the result of loadConfig, with the text of the key. */
function load(given: Parameters<typeof loadConfig>[0] = {}): { serverUrl: string; key: string | undefined } {
  const { serverUrl, key } = loadConfig(given);
  return { serverUrl, key: key?.reveal() };
}

const defaultServerUrl = "http://127.0.0.1:5555";

interface Case {
  files?: Record<string, string>;
  env?: Record<string, string>;
  given?: Parameters<typeof loadConfig>[0];
  serverUrl?: string;
  key?: string;
}

test.each<[string, Case]>([
  ["nothing", {}],
  ["given", { given: { serverUrl: "https://b", apiKey: testKey }, serverUrl: "https://b", key: testKey }],
  [
    "given before the environment",
    {
      given: { serverUrl: "https://b", apiKey: testKey },
      env: { MSB_API_KEY: "msb_other", MSB_SERVER_URL: "https://other" },
      serverUrl: "https://b",
      key: testKey,
    },
  ],
  ["environment", { env: { MSB_API_KEY: testKey, MSB_SERVER_URL: "https://a" }, serverUrl: "https://a", key: testKey }],
  [
    "environment first",
    {
      env: { MSB_API_KEY: testKey, MSB_SERVER_URL: "https://a" },
      files: { [near]: "MSB_API_KEY=msb_other\nMSB_SERVER_URL=https://other\n" },
      serverUrl: "https://a",
      key: testKey,
    },
  ],
  [
    "working directory",
    { files: { [near]: theKey + remote }, serverUrl: "https://sandboxes.example.org", key: testKey },
  ],
  ["parent", { files: { [far]: theKey + remote }, serverUrl: "https://sandboxes.example.org", key: testKey }],
  ["nearest", { files: { [near]: theKey, [far]: "MSB_API_KEY=msb_other\n" }, key: testKey }],
  [
    "key and server from different files",
    { files: { [near]: local, [far]: theKey }, serverUrl: "http://127.0.0.1:7001", key: testKey },
  ],
  [
    "empty in a file is unset",
    {
      files: { [near]: "MSB_API_KEY=\nMSB_SERVER_URL=''\n", [far]: theKey + local },
      serverUrl: "http://127.0.0.1:7001",
      key: testKey,
    },
  ],
  ["without a key, any server", { files: { [near]: remote }, serverUrl: "https://sandboxes.example.org" }],
  [
    "the server from the environment",
    {
      files: { [near]: theKey },
      env: { MSB_SERVER_URL: "https://a" },
      serverUrl: "https://a",
      key: testKey,
    },
  ],
  [
    "a server on this machine",
    { files: { [near]: local }, env: { MSB_API_KEY: testKey }, serverUrl: "http://127.0.0.1:7001", key: testKey },
  ],
  ["white space around the key", { given: { apiKey: ` ${testKey}\n` }, key: testKey }],
  ["a URL with a path", { given: { serverUrl: "https://a/msb/" }, serverUrl: "https://a/msb" }],
  [
    "localhost",
    { given: { serverUrl: "http://LOCALHOST:1", apiKey: testKey }, serverUrl: "http://LOCALHOST:1", key: testKey },
  ],
  [
    "127.0.0.0/8",
    { given: { serverUrl: "http://127.9.9.9", apiKey: testKey }, serverUrl: "http://127.9.9.9", key: testKey },
  ],
  ["::1", { given: { serverUrl: "http://[::1]:1", apiKey: testKey }, serverUrl: "http://[::1]:1", key: testKey }],
  [
    "an IPv4-mapped address",
    {
      given: { serverUrl: "http://[::ffff:127.0.0.1]", apiKey: testKey },
      serverUrl: "http://[::ffff:127.0.0.1]",
      key: testKey,
    },
  ],
  ["plain http without a key", { given: { serverUrl: "http://a" }, serverUrl: "http://a" }],
])("loadConfig finds: %s", (_, { files = {}, env = {}, given, serverUrl = defaultServerUrl, key }) => {
  for (const [name, text] of Object.entries(files)) write(name, text);
  for (const [name, value] of Object.entries(env)) vi.stubEnv(name, value);
  expect(load(given)).toEqual({ serverUrl, key });
});

// Files that others may have written must determine neither the key nor the server that it is sent to.
test.each<[string, { files: [string, string, number][]; key?: string; says?: string }]>([
  [
    "server beside the environment's key",
    { files: [[near, remote, 0o600]], key: testKey, says: "the API key is from another source" },
  ],
  [
    "server beside another .env's key",
    {
      files: [
        [far, remote, 0o600],
        [near, theKey, 0o600],
      ],
      says: "the API key is from another source",
    },
  ],
  [
    "the key in the environment replaces the file's",
    { files: [[near, remote + theKey, 0o644]], key: "msb_other", says: "the API key is from another source" },
  ],
  ["written by everyone, key", { files: [[far, theKey, 0o666]], says: "chmod o-w" }],
  ["written by everyone, server", { files: [[far, local, 0o602]], key: testKey, says: "MSB_SERVER_URL in" }],
  ["written by everyone, without the variable", { files: [[far, "A=b\n", 0o666]], key: testKey }],
  ["written by everyone, but not used", { files: [[far, "MSB_API_KEY=msb_other", 0o666]], key: testKey }],
  ["written by the group", { files: [[far, theKey, 0o664]] }],
  ["malformed", { files: [[near, "MSB_API_KEY: hunter2\n", 0o600]], says: ".env: line 1" }],
  ["no URL", { files: [[near, "MSB_SERVER_URL=hunter2\n", 0o600]], key: testKey, says: "must be https://" }],
  ["far too long", { files: [[near, "# hello\n".repeat((1 << 17) + 1), 0o600]], says: "longer than" }],
])("trust in a .env file: %s", (_, { files, key = "", says }) => {
  for (const file of files) write(...file);
  vi.stubEnv("MSB_API_KEY", key);
  if (says === undefined) {
    expect(load().key).toBe(testKey);
    return;
  }
  const error = problemOf(() => load());
  expect(error.message).toContain(says);
  expect(error.message).not.toMatch(/canary|hunter2/);
});

function problemOf(body: () => unknown): ConfigError {
  try {
    body();
  } catch (error) {
    expect(error).toBeInstanceOf(ConfigError);
    return error as ConfigError;
  }
  throw new Error("no error was thrown");
}

// Only root can change the owner to another user. For other users, the test only changes their own effective user id.
test("a file of another user is not trusted", () => {
  const path = write(near, theKey);
  const user = process.geteuid?.() ?? 0;
  vi.spyOn(process, "geteuid").mockReturnValue(user + 1000);
  if (user === 0) chownSync(path, 1, 1);
  expect(problemOf(() => load()).message).toContain("belongs to another user");
  vi.restoreAllMocks();
});

test("a directory named .env is skipped", () => {
  mkdirSync(join(root, near));
  write(far, theKey);
  expect(load().key).toBe(testKey);
});

test("a deleted working directory has no .env files", () => {
  rmSync(dirname(join(root, near)), { recursive: true });
  expect(load()).toEqual({ serverUrl: defaultServerUrl, key: undefined });
});

describe("a server's URL", () => {
  test.each([
    "ftp://a",
    "a:5555",
    "http://",
    "https://user:hunter2@a",
    "https://hunter2@a",
    "https://a?hunter2",
    "https://a/#hunter2",
    "https://a?",
    "https:\\\\hunter2",
    "https://a b/hunter2",
    "https://a/\nhunter2",
    "https://a:99999/hunter2",
    " https://hunter2",
  ])("%j is refused without its text", (serverUrl) => {
    const { message } = problemOf(() => load({ serverUrl }));
    expect(message).toContain("must be https://");
    expect(message).not.toContain("hunter2");
  });
});

test.each(["http://a", "http://192.168.0.1:5555", "http://127.0.0.1.nip.io", "http://localhost.a", "http://[::2]"])(
  "the key is not sent to %s in plain text",
  (serverUrl) => {
    const { message } = problemOf(() => load({ serverUrl, apiKey: testKey }));
    expect(message).toContain("over plain http");
    expect(message).not.toContain("canary");
  },
);

test.each(["msb_a b", "msb_a\nb", "msb_\u00e4", "msb_\u007f"])("the key %j is refused without its text", (apiKey) => {
  const { message } = problemOf(() => load({ apiKey }));
  expect(message).toContain("copy the complete key");
  expect(message).not.toContain("msb_");
});
