import { closeSync, fstatSync, openSync, readFileSync, type Stats, statSync } from "node:fs";
import { BlockList, isIP } from "node:net";
import { dirname, join } from "node:path";
import { lookup } from "./dotenv.js";
import { ConfigError } from "./errors.js";

const defaultServerUrl = "http://127.0.0.1:5555";

/** The maximum size of a .env file, in bytes; real files are much shorter. */
const maxDotenv = 1 << 20;

/** An API key. Printing, logging or copying it does not show its text. */
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

/** The server's URL and the API key. */
export interface Config {
  /** The URL without a trailing slash. */
  serverUrl: string;
  /** Undefined if there is no key; then only a server in dev mode accepts requests. */
  key: Key | undefined;
}

/** A value and the file it is from. Without a file, it is from the options or the environment. */
interface Found {
  value: string;
  file?: string;
}

/**
 * Finds the server and the key. Each is looked up separately, and the first value that is not empty is used:
 *
 * 1. the options, which must not be empty if they are given,
 * 2. the environment,
 * 3. the file .env of the working directory and of each parent directory, the nearest first.
 *
 * Someone who can write one of these files could have the key sent to their own server. Therefore loadConfig throws
 * a ConfigError, with a message that says what to do, in two cases: if a value is from a file that everyone can write
 * or that belongs to a user other than this one and root; and if a .env file names a server on another machine and
 * the key is from another source.
 */
export function loadConfig(given: { serverUrl?: string | undefined; apiKey?: string | undefined }): Config {
  for (const [name, value] of Object.entries(given)) {
    if (typeof value === "string" && value.trim() === "") {
      throw new ConfigError(`${name} is empty: give a value, or leave it out to use the environment or a .env file`);
    }
  }
  const server = find("MSB_SERVER_URL", given.serverUrl);
  const serverUrl = (server.value || defaultServerUrl).replace(/\/+$/, "");
  const url = parseServerUrl(serverUrl, server.file);
  const key = find("MSB_API_KEY", given.apiKey);
  const text = key.value.trim();
  if (text === "") return { serverUrl, key: undefined };
  if (!/^[!-~]+$/.test(text)) {
    throw new ConfigError(
      "the API key contains a space or another character that keys never contain: " +
        "copy the complete key and nothing else",
    );
  }
  if (!isLoopback(url.hostname)) {
    if (url.protocol !== "https:") {
      throw new ConfigError(
        `the API key is not sent to ${url.hostname} over plain http, because others could read it: use https, ` +
          `or a tunnel ('ssh -L 5555:127.0.0.1:5555 ${url.hostname}', then the URL ${defaultServerUrl})`,
      );
    }
    if (server.file !== undefined && server.file !== key.file) {
      throw new ConfigError(
        `${server.file} sets the server to ${serverUrl}, but the API key is from another source: the key is not sent ` +
          "to a server from a .env file that does not contain the key, because somebody else may have written that " +
          "file. If the server is right, set MSB_SERVER_URL where the key is set",
      );
    }
  }
  return { serverUrl, key: new Key(text) };
}

/** Parses and checks the URL. The error does not contain the URL, which may contain a password. */
function parseServerUrl(text: string, file: string | undefined): URL {
  // Check the text first, because URL ignores some white space and treats backslashes as slashes.
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

/** Reports whether the host of a URL is certainly this machine. */
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
    const untrusted = untrustedReason(found.stats, file);
    if (untrusted) {
      throw new ConfigError(`${name} in ${file} is not used, because ${untrusted}, or set ${name} in the environment`);
    }
    return { value, file };
  }
  return { value: "" };
}

/** Returns the paths of the possible .env files, the nearest first. */
function dotenvFiles(): string[] {
  const files: string[] = [];
  try {
    for (let directory = process.cwd(), below = ""; directory !== below; directory = dirname(directory)) {
      files.push(join(directory, ".env"));
      below = directory;
    }
  } catch {
    // The working directory was deleted.
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

/** Reads a file. Returns undefined if it does not exist. */
function read(file: string): { text: string; stats: Stats } | undefined {
  try {
    // Skip directories, because some people name a virtual environment .env, and pipes, which would block.
    if (!statSync(file).isFile()) return undefined;
  } catch {
    return undefined;
  }
  let descriptor: number;
  try {
    descriptor = openSync(file, "r");
  } catch (error) {
    throw new ConfigError(
      `read ${file}: ${(error as NodeJS.ErrnoException).code}: make the file your own ('sudo chown "$USER" ${file}'), ` +
        "or set MSB_SERVER_URL and MSB_API_KEY in the environment",
    );
  }
  try {
    const stats = fstatSync(descriptor);
    if (stats.size > maxDotenv) throw new ConfigError(`read ${file}: the file is longer than ${maxDotenv >> 10} KiB`);
    return { text: readFileSync(descriptor, "utf8"), stats };
  } finally {
    closeSync(descriptor);
  }
}

/**
 * Says why another user may have written a file, and what to do. Returns "" if only this user, root and the file's
 * group can write it. The group is trusted, because many systems give each user a group of their own and make files
 * writable by it.
 */
function untrustedReason(stats: Stats, file: string): string {
  const user = process.geteuid?.();
  if (user === undefined) return ""; // Windows, where file modes mean nothing
  if (stats.mode & 0o002) {
    return `everyone on this machine can write that file: if you wrote its contents, run 'chmod o-w ${file}'`;
  }
  if (stats.uid !== 0 && stats.uid !== user) {
    return `that file belongs to another user (uid ${stats.uid}): if you wrote its contents, run 'chown ${user} ${file}'`;
  }
  return "";
}
