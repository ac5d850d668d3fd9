import { closeSync, fstatSync, openSync, readFileSync, type Stats, statSync } from "node:fs";
import { BlockList, isIP } from "node:net";
import { dirname, join } from "node:path";
import { lookup } from "./dotenv.js";
import { ConfigError } from "./errors.js";

const defaultServerUrl = "http://127.0.0.1:5555";

/** Longer than any .env file that people write, in bytes. */
const maxDotenv = 1 << 20;

/** An API key. However it is printed, logged or copied, it does not tell its text. */
export class Key {
  readonly #text: string;

  constructor(text: string) {
    this.#text = text;
  }

  /** The text of the key. */
  reveal(): string {
    return this.#text;
  }
}

/** Where requests go. */
export interface Config {
  /** Without a slash at its end. */
  serverUrl: string;
  /** Absent: only a server in dev mode takes requests then. */
  key: Key | undefined;
}

/** A value, and the file that it is from; no file: the caller gave it, or the environment. */
interface Found {
  value: string;
  file?: string;
}

/**
 * Finds the server and the key. Each by itself, it is the first that is not empty of
 *
 * 1. what the caller gives,
 * 2. the environment,
 * 3. the file .env of the working directory, and of each directory above it, the nearest first.
 *
 * Whoever can write such a file could have the key sent to a server of his own. So it throws a ConfigError
 * that says what to do when a value is from a file that everyone can write, or that belongs to another user
 * than this one and root; and when a .env file names a server off this machine, but the key is from elsewhere.
 */
export function loadConfig(given: { serverUrl?: string | undefined; apiKey?: string | undefined }): Config {
  const server = find("MSB_SERVER_URL", given.serverUrl);
  const serverUrl = (server.value || defaultServerUrl).replace(/\/+$/, "");
  const url = parseServerUrl(serverUrl, server.file);
  const key = find("MSB_API_KEY", given.apiKey);
  const text = key.value.trim();
  if (text === "") return { serverUrl, key: undefined };
  if (!/^[!-~]+$/.test(text)) {
    throw new ConfigError(
      "the API key holds a space or another character that no key has: copy it whole, and nothing of what is around it",
    );
  }
  if (!isLoopback(url.hostname)) {
    if (url.protocol !== "https:") {
      throw new ConfigError(
        `the API key is not sent to ${url.hostname} over plain http, where others could read it: use https, ` +
          `or a tunnel ('ssh -L 5555:127.0.0.1:5555 ${url.hostname}', and then ${defaultServerUrl})`,
      );
    }
    if (server.file !== undefined && server.file !== key.file) {
      throw new ConfigError(
        `${server.file} names the server ${serverUrl}, but the API key is from elsewhere: a key is not sent ` +
          "where a file beside it says, which may be another's. If the server is right, set MSB_SERVER_URL where the key is",
      );
    }
  }
  return { serverUrl, key: new Key(text) };
}

/** The error does not repeat the URL: it may hold a password. */
function parseServerUrl(text: string, file: string | undefined): URL {
  // URL drops white space and turns backslashes round, so that what it reads is not what a person reads.
  const url =
    /^https?:\/\/[!-~]+$/i.test(text) && !/[\\?#]/.test(text) && URL.canParse(text) ? new URL(text) : undefined;
  if (url?.username !== "" || url.password !== "") {
    throw new ConfigError(
      `${file === undefined ? "the server's URL" : `MSB_SERVER_URL in ${file}`} must be https://HOST[:PORT] or ` +
        "http://HOST[:PORT], without a user, query or fragment",
    );
  }
  return url;
}

const loopback = new BlockList();
loopback.addSubnet("127.0.0.0", 8);
loopback.addAddress("::1", "ipv6");

/** Says whether the host of a URL can only be this machine. */
function isLoopback(hostname: string): boolean {
  const host = hostname.replace(/^\[(.*)\]$/, "$1");
  return host === "localhost" || (isIP(host) !== 0 && loopback.check(host, isIP(host) === 6 ? "ipv6" : "ipv4"));
}

function find(name: string, given: string | undefined): Found {
  const value = given || process.env[name];
  if (value) return { value };
  for (const file of dotenvFiles()) {
    const found = read(file);
    if (!found) continue;
    const value = valueIn(name, found.text, file);
    if (value === "") continue;
    const problem = distrust(found.stats, file);
    if (problem) {
      throw new ConfigError(`${name} in ${file} is not used, since ${problem}; or set ${name} in the environment`);
    }
    return { value, file };
  }
  return { value: "" };
}

/** The places of .env files, the nearest first. */
function dotenvFiles(): string[] {
  const files: string[] = [];
  try {
    for (let directory = process.cwd(), below = ""; directory !== below; directory = dirname(directory)) {
      files.push(join(directory, ".env"));
      below = directory;
    }
  } catch {
    // The working directory is gone.
  }
  return files;
}

function valueIn(name: string, text: string, file: string): string {
  try {
    return lookup(text, name);
  } catch (error) {
    throw new ConfigError(`read ${name} from ${file}: ${(error as Error).message}`);
  }
}

/** Reads a file, which need not be there. */
function read(file: string): { text: string; stats: Stats } | undefined {
  try {
    // Not a directory, as virtual environments are called at times, nor a pipe, which would block.
    if (!statSync(file).isFile()) return undefined;
  } catch {
    return undefined;
  }
  let descriptor: number;
  try {
    descriptor = openSync(file, "r");
  } catch (error) {
    throw new ConfigError(
      `read ${file}: ${(error as NodeJS.ErrnoException).code}: make it your own ('sudo chown "$USER" ${file}'), ` +
        "or set MSB_SERVER_URL and MSB_API_KEY in the environment",
    );
  }
  try {
    const stats = fstatSync(descriptor);
    if (stats.size > maxDotenv) throw new ConfigError(`read ${file}: it is longer than ${maxDotenv >> 10} KiB`);
    return { text: readFileSync(descriptor, "utf8"), stats };
  } finally {
    closeSync(descriptor);
  }
}

/**
 * Says why a file's text may be another user's, and what to do; empty if it is not. Members of its group are
 * trusted: many systems give each user one of his own, and let it write.
 */
function distrust(stats: Stats, file: string): string {
  const user = process.geteuid?.();
  if (user === undefined) return ""; // Windows, whose modes say nothing
  if (stats.mode & 0o002) {
    return `everyone on this machine can write that file: 'chmod o-w ${file}' if its text is yours`;
  }
  if (stats.uid !== 0 && stats.uid !== user) {
    return `that file belongs to another user, with uid ${stats.uid}: 'chown ${user} ${file}' if its text is yours`;
  }
  return "";
}
