import "./dispose.js";
import { randomUUID } from "node:crypto";
import { chmod, rename, rm, stat } from "node:fs/promises";
import { createWriteStream } from "node:fs";
import { pipeline } from "node:stream/promises";
import {
  checkCallbacks,
  checkInput,
  checkOptionalStrings,
  checkOptions,
  checkString,
  unexpectedFormat,
} from "./check.js";
import { ConflictError, InvalidParamsError } from "./errors.js";
import type { CallOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";
import type { ServerEvent } from "./server.js";
import { extractTree, packTree, readFile } from "./tree.js";

/** What the server knows about a file. */
export interface FileInfo {
  /** The absolute path. If it is not valid UTF-8, it has replacement characters, and path_base64 has its bytes. */
  path: string;
  path_base64?: string;
  /** other is a device, a pipe or a socket. */
  type: "file" | "directory" | "symlink" | "other";
  /** Bytes. */
  size: number;
  /** The permissions in octal, such as 0644. */
  mode: string;
  uid: number;
  gid: number;
  /** The names of the owner in the sandbox; empty if there are none. */
  user: string;
  group: string;
  /** The time of the last change in UTC, such as 2026-01-02T03:04:05.678Z. */
  modified_at: string;
  /** What a symbolic link contains. */
  link_target?: string;
  /** The file to which a symbolic link leads, if there is one. */
  target?: FileInfo;
  /** Whether the file did not exist before; only after a change. */
  created?: boolean;
}

/** A change of a file. */
export interface FileChange {
  /** rename: the file was moved away from this path. overflow: there were too many changes to report them all. */
  type: "create" | "write" | "remove" | "rename" | "chmod" | "overflow" | (string & {});
  /** The path relative to the watched path, which itself is the empty path. */
  path: string;
  /** The bytes of the path if it is not valid UTF-8. */
  path_base64?: string;
}

/** Options of reading a file. */
export interface ReadOptions extends CallOptions {
  /** text returns a string, bytes a Uint8Array, and stream an iterator of the file's pieces; the default is text. */
  format?: "text" | "bytes" | "stream" | undefined;
}

/** Options of files that are created. */
export interface WriteOptions extends CallOptions {
  /** The permissions in octal, such as "0755"; the default is those of the file that is replaced, or 0644. */
  mode?: string | undefined;
  /** The owner: a name or number in the sandbox, optionally with : and a group. */
  user?: string | undefined;
}

/** Options of a transfer. */
export interface TransferOptions extends CallOptions {
  /** Is called with the number of bytes that were transferred so far. */
  onProgress?: ((bytes: number) => void) | undefined;
}

/** Options of an upload. */
export interface UploadOptions extends TransferOptions {
  /** The owner of what is written: a name or number in the sandbox, optionally with : and a group. */
  user?: string | undefined;
}

/**
 * The files of a sandbox. Relative paths in the sandbox begin at its workdir.
 *
 * If a file does not exist, methods throw a SandboxNotFoundError; if it has the wrong type, a ConflictError.
 */
export class Files {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /**
   * Returns the content of a file of any size.
   *
   * @throws ConflictError if the text is not valid UTF-8
   */
  read(path: string, options?: ReadOptions & { format?: "text" | undefined }): Promise<string>;
  read(path: string, options: ReadOptions & { format: "bytes" }): Promise<Uint8Array>;
  read(path: string, options: ReadOptions & { format: "stream" }): Promise<AsyncIterable<Uint8Array>>;
  async read(path: string, options?: ReadOptions): Promise<string | Uint8Array | AsyncIterable<Uint8Array>> {
    const { format = "text", signal } = checkOptions(options);
    if (!["text", "bytes", "stream"].includes(format)) {
      throw new InvalidParamsError(`format must be text, bytes or stream, not ${String(format)}`);
    }
    const pieces = this.#sandbox._get(checkString("path", path), { signal });
    if (format === "stream") return pieces;
    const all: Buffer[] = [];
    for await (const piece of pieces) all.push(piece);
    const bytes = Buffer.concat(all);
    if (format === "bytes") return bytes;
    try {
      return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    } catch (cause) {
      throw new ConflictError(`${path} is not valid UTF-8: read it with the format bytes`, { cause });
    }
  }

  /** Writes a file of any size, and creates missing directories. An existing file is replaced in one step. */
  async write(
    path: string,
    data: string | Uint8Array | AsyncIterable<Uint8Array>,
    options?: WriteOptions,
  ): Promise<FileInfo> {
    const { signal, ...rest } = checkOptions(options);
    const isStream = typeof data === "object" && data !== null && Symbol.asyncIterator in data;
    const input = isStream ? () => data : checkInput("data", data);
    const body = typeof input === "string" ? Buffer.from(input) : input;
    return this.#put(path, body, rest, { idempotent: !isStream, signal });
  }

  /** Returns the entries of a directory sorted by name; with depth, also those of so many levels. */
  async list(path: string, options?: CallOptions & { depth?: number | undefined }): Promise<FileInfo[]> {
    const { depth, signal } = checkOptions(options);
    const params = { path: checkString("path", path), depth: depth ?? undefined };
    const result = (await this.#call("list", params, { idempotent: true, signal })) as { entries?: unknown } | null;
    if (!Array.isArray(result?.entries)) throw unexpectedFormat("the list of files has");
    return result.entries.map(toInfo);
  }

  /** Describes a file. A symbolic link is not followed. */
  async stat(path: string, { signal }: CallOptions = {}): Promise<FileInfo> {
    return toInfo(await this.#call("stat", { path: checkString("path", path) }, { idempotent: true, signal }));
  }

  /** Reports whether a file exists. A symbolic link exists even if it leads nowhere. */
  async exists(path: string, { signal }: CallOptions = {}): Promise<boolean> {
    const params = { path: checkString("path", path) };
    const result = (await this.#call("exists", params, { idempotent: true, signal })) as { exists?: unknown } | null;
    if (typeof result?.exists !== "boolean") throw unexpectedFormat("the result of exists has");
    return result.exists;
  }

  /** Creates a directory and its missing parents. It is not an error if the directory exists. */
  async mkdir(path: string, options?: WriteOptions): Promise<FileInfo> {
    const { mode, user, signal } = checkOptions(options);
    checkOptionalStrings({ mode, user });
    const params = { path: checkString("path", path), mode: mode ?? undefined, user: user ?? undefined };
    return toInfo(await this.#call("mkdir", params, { signal }));
  }

  /** Renames a file or a directory. A file at the new path is replaced, and missing directories are created. */
  async move(from: string, to: string, { signal }: CallOptions = {}): Promise<FileInfo> {
    const params = { from: checkString("from", from), to: checkString("to", to) };
    return toInfo(await this.#call("move", params, { limit: 0, signal }));
  }

  /** Removes a file or an empty directory; with recursive, also a directory with everything in it. */
  async remove(path: string, options?: CallOptions & { recursive?: boolean | undefined }): Promise<void> {
    const { recursive, signal } = checkOptions(options);
    await this.#call(
      "remove",
      { path: checkString("path", path), recursive: recursive ?? undefined },
      { limit: 0, signal },
    );
  }

  /**
   * Watches a file, or the files in a directory; with recursive, also everything below. Changes after the return of
   * watch are reported. Iterate over the result, and close it in the end.
   */
  async watch(path: string, options?: CallOptions & { recursive?: boolean | undefined }): Promise<Watcher> {
    const { recursive, signal } = checkOptions(options);
    const params = { path: checkString("path", path), recursive: recursive ?? undefined };
    const end = new AbortController();
    const onAbort = () => end.abort(signal?.reason);
    signal?.throwIfAborted();
    signal?.addEventListener("abort", onAbort);
    end.signal.addEventListener("abort", () => signal?.removeEventListener("abort", onAbort));
    const events = this.#sandbox._events("sandbox.fs.watch", params, { signal: end.signal, idempotent: true });
    try {
      const { value } = await events.next();
      if (value?.name !== "started") throw unexpectedFormat("the stream of changes has");
    } catch (error) {
      end.abort();
      throw error;
    }
    return new Watcher(events, end);
  }

  /**
   * Uploads a local file to the path remote, or what is in a local directory into the directory remote. Permissions
   * are kept. Symbolic links in the directory stay links; pipes, sockets and devices are left out.
   */
  async upload(local: string, remote: string, options?: UploadOptions): Promise<void> {
    const { onProgress, user, signal } = checkOptions(options);
    checkCallbacks({ onProgress });
    const stats = await stat(checkString("local", local));
    if (stats.isDirectory()) {
      const headers = { "Content-Type": "application/x-tar" };
      const params = { path: checkString("remote", remote), user: user ?? undefined };
      checkOptionalStrings({ user });
      const body = () => counted(packTree(local), onProgress);
      await this.#sandbox._put(params, { headers, body, idempotent: true, signal });
      return;
    }
    const mode = (stats.mode & 0o777).toString(8).padStart(4, "0");
    const body = () => counted(readFile(local), onProgress);
    await this.#put(checkString("remote", remote), body, { mode, user }, { idempotent: true, signal });
  }

  /**
   * Downloads a file to the path local, or what is in a directory into the directory local. Permissions are kept. A
   * file is replaced when its download is complete.
   *
   * @throws UnexpectedAnswerError if the directory has symbolic links that may lead out of it. Nothing is ever written
   *   outside of local.
   */
  async download(remote: string, local: string, options?: TransferOptions): Promise<void> {
    const { onProgress, signal } = checkOptions(options);
    checkCallbacks({ onProgress });
    checkString("local", local);
    const info = await this.stat(remote, { signal });
    const { type, mode } = info.target ?? info;
    if (type === "directory") {
      const archive = this.#sandbox._get(remote, { headers: { Accept: "application/x-tar" }, signal });
      await extractTree(counted(archive, onProgress), local);
      return;
    }
    const incomplete = `${local}.${randomUUID()}`;
    try {
      const pieces = counted(this.#sandbox._get(remote, { signal }), onProgress);
      await pipeline(pieces, createWriteStream(incomplete, { flags: "wx", mode: 0o600 }));
      await chmod(incomplete, Number.parseInt(mode, 8) & 0o777);
      await rename(incomplete, local);
    } catch (error) {
      await rm(incomplete, { force: true });
      throw error;
    }
  }

  async #put(
    path: string,
    body: Uint8Array | (() => AsyncIterable<Uint8Array>),
    { mode, user }: WriteOptions,
    options: CallOptions & { idempotent: boolean },
  ): Promise<FileInfo> {
    checkOptionalStrings({ mode, user });
    const params = { path: checkString("path", path), mode: mode ?? undefined, user: user ?? undefined };
    const headers = { "Content-Type": "application/octet-stream" };
    return toInfo(await this.#sandbox._put(params, { body, headers, ...options }));
  }

  #call(
    method: string,
    params: Record<string, unknown>,
    options: CallOptions & { limit?: number; idempotent?: boolean },
  ): Promise<unknown> {
    return this.#sandbox._call(`sandbox.fs.${method}`, params, options);
  }
}

/** The changes of the files that are watched. Iterating ends when the watcher is closed. */
export class Watcher implements AsyncIterable<FileChange>, AsyncDisposable {
  readonly #events: AsyncGenerator<ServerEvent>;
  readonly #end: AbortController;
  #isClosed = false;

  /** @internal */
  constructor(events: AsyncGenerator<ServerEvent>, end: AbortController) {
    this.#events = events;
    this.#end = end;
  }

  /** Yields the changes. Breaking out of the iteration closes the watcher. */
  async *[Symbol.asyncIterator](): AsyncGenerator<FileChange, void> {
    try {
      for await (const { name, data } of this.#events) {
        if (name === "change") yield data as unknown as FileChange;
      }
    } catch (error) {
      if (!this.#isClosed) throw error;
    } finally {
      this.close();
    }
  }

  /** Stops watching. */
  close(): void {
    this.#isClosed = true;
    this.#end.abort();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
  }
}

/** Passes pieces on, and calls onProgress with the bytes so far. */
async function* counted<T extends Uint8Array>(
  pieces: AsyncIterable<T>,
  onProgress: ((bytes: number) => void) | undefined,
): AsyncGenerator<T> {
  let bytes = 0;
  for await (const piece of pieces) {
    yield piece;
    bytes += piece.length;
    onProgress?.(bytes);
  }
}

function toInfo(info: unknown): FileInfo {
  if (typeof (info as FileInfo | null)?.path !== "string") throw unexpectedFormat("the description of the file has");
  return info as FileInfo;
}
