import type { Stats } from "node:fs";
import {
  chmod,
  type FileHandle,
  link,
  lstat,
  mkdir,
  open,
  readdir,
  readlink,
  symlink,
  unlink,
  utimes,
} from "node:fs/promises";
import { MicrosandboxError, UnexpectedAnswerError } from "./errors.js";
import { archiveEnd, decodeArchive, encodeHeader, type Entry, padding } from "./tar.js";

/** The size of the pieces that are read from local files, in bytes. */
const pieceSize = 256 << 10;

/** Yields the content of a local file. size is the size that it must have; without it, it may change. */
export async function* readFile(path: string | Buffer, size?: number): AsyncGenerator<Buffer> {
  const file = await open(path, "r");
  try {
    let left = size ?? Infinity;
    while (left > 0) {
      const { bytesRead, buffer } = await file.read(Buffer.alloc(Math.min(pieceSize, left)));
      if (bytesRead === 0) {
        if (size === undefined) return;
        throw new MicrosandboxError(`${path} became shorter while it was uploaded: upload it again`);
      }
      left -= bytesRead;
      yield buffer.subarray(0, bytesRead);
    }
  } finally {
    await file.close();
  }
}

/**
 * Yields an archive of what is in a local directory: files, directories and symbolic links. Pipes, sockets and devices
 * are left out.
 */
export async function* packTree(root: string): AsyncGenerator<Buffer> {
  yield* packDirectory(new LocalTree(root), []);
  yield archiveEnd;
}

async function* packDirectory(tree: LocalTree, parts: string[]): AsyncGenerator<Buffer> {
  for (const name of (await readdir(tree.path(parts), { encoding: "buffer" })).sort(Buffer.compare)) {
    const entry = [...parts, name.toString("latin1")];
    const path = tree.path(entry);
    const stats = await lstat(path);
    const header = {
      name: entry.join("/"),
      mode: stats.mode & 0o777,
      size: 0,
      modified: stats.mtimeMs / 1000,
      linkName: "",
    };
    if (stats.isDirectory()) {
      yield encodeHeader({ ...header, name: `${header.name}/`, type: "directory" });
      yield* packDirectory(tree, entry);
    } else if (stats.isSymbolicLink()) {
      const linkName = (await readlink(path, { encoding: "buffer" })).toString("latin1");
      yield encodeHeader({ ...header, type: "symlink", linkName });
    } else if (stats.isFile()) {
      yield encodeHeader({ ...header, type: "file", size: stats.size });
      yield* readFile(path, stats.size);
      yield padding(stats.size);
    }
  }
}

/**
 * Extracts an archive from a sandbox into a local directory, and replaces the files that exist. It never writes outside
 * of the directory, because it follows no symbolic links below it, and does not create links that lead out of it.
 * Permissions are restored, but not set-user-ID and similar bits, and not owners.
 *
 * @throws UnexpectedAnswerError if an entry would be outside of the directory
 */
export async function extractTree(source: AsyncIterable<Uint8Array>, root: string): Promise<void> {
  await mkdir(root, { recursive: true });
  const tree = new LocalTree(root);
  const directories: { path: Buffer; entry: Entry }[] = [];
  for await (const entry of decodeArchive(source)) {
    const parts = safeParts(entry.name);
    const path = tree.path(parts);
    const name = parts.join("/");
    if (entry.type === "directory") {
      await tree.makeDirectories(parts);
      if (parts.length > 0) directories.push({ path, entry });
      continue;
    }
    if (parts.length === 0) throw refused(entry.name, "has no name");
    await tree.makeDirectories(parts.slice(0, -1));
    if (entry.type === "file") {
      await tree.remove(parts);
      await writeFile(path, entry);
    } else if (entry.type === "symlink") {
      checkTarget(name, entry.linkName, parts.length - 1);
      await tree.remove(parts);
      await symlink(Buffer.from(entry.linkName, "latin1"), path);
    } else {
      const target = safeParts(entry.linkName);
      await tree.makeDirectories(target.slice(0, -1));
      if (!(await lstatOrNot(tree.path(target)))?.isFile() || tree.path(target).equals(path)) {
        throw refused(name, `is a link to ${shown(entry.linkName)}, which is not a file of the archive`);
      }
      await tree.remove(parts);
      await link(tree.path(target), path);
    }
  }
  // Last, because a directory may not be writable, and writing in it changes its time. Their paths still are
  // directories, because extractTree removes none.
  for (const { path, entry } of directories.reverse()) {
    await utimes(path, entry.modified, entry.modified);
    await chmod(path, entry.mode & 0o777);
  }
}

/** Creates a file that does not exist, with the content of an entry. */
async function writeFile(path: Buffer, entry: Entry): Promise<void> {
  const file = await open(path, "wx", 0o600);
  try {
    for await (const piece of entry.content) await writeAll(file, piece);
    await file.chmod(entry.mode & 0o777);
    await file.utimes(entry.modified, entry.modified);
  } finally {
    await file.close();
  }
}

async function writeAll(file: FileHandle, piece: Buffer): Promise<void> {
  for (let offset = 0; offset < piece.length;) {
    offset += (await file.write(piece, offset)).bytesWritten;
  }
}

/** A local directory. The parts of a path in it are latin1 strings, as in an archive. */
class LocalTree {
  readonly #root: Buffer;
  /** The paths that are directories, and no symbolic links. */
  readonly #directories = new Set<string>([""]);

  constructor(root: string) {
    this.#root = Buffer.from(`${root}/`);
  }

  path(parts: string[]): Buffer {
    return Buffer.concat([this.#root, Buffer.from(parts.join("/"), "latin1")]);
  }

  /** Creates a directory and its parents, as far as they are missing. */
  async makeDirectories(parts: string[]): Promise<void> {
    for (let n = 1; n <= parts.length; n++) {
      const directory = parts.slice(0, n);
      const name = directory.join("/");
      if (this.#directories.has(name)) continue;
      const stats = await lstatOrNot(this.path(directory));
      if (!stats) await mkdir(this.path(directory), 0o700);
      else if (!stats.isDirectory()) throw refused(name, "already exists and is not a directory");
      this.#directories.add(name);
    }
  }

  /** Removes a file or a symbolic link, if it exists. */
  async remove(parts: string[]): Promise<void> {
    const stats = await lstatOrNot(this.path(parts));
    if (stats?.isDirectory()) throw refused(parts.join("/"), "already exists as a directory");
    if (stats) await unlink(this.path(parts));
  }
}

async function lstatOrNot(path: Buffer): Promise<Stats | undefined> {
  try {
    return await lstat(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** Returns the parts of a path in an archive. Refuses a path that leads out of the archive. */
function safeParts(name: string): string[] {
  const parts = name.split("/").filter((part) => part !== "" && part !== ".");
  // On Windows, \ also separates parts, and : separates a drive or a stream.
  const special = process.platform === "win32" ? /[\0\\:]/ : /\0/;
  if (name.startsWith("/") || parts.includes("..") || special.test(name)) {
    throw refused(name, "leads out of the directory");
  }
  return parts;
}

/**
 * Refuses a symbolic link that leads out of the archive. depth is the number of directories above the link. Only the
 * beginning of the target may have "..": after another symbolic link, it would be unclear where it leads.
 */
function checkTarget(name: string, linkName: string, depth: number): void {
  const parts = linkName.split("/").filter((part) => part !== "" && part !== ".");
  const ups = parts.findIndex((part) => part !== "..");
  const up = ups < 0 ? parts.length : ups;
  const special = process.platform === "win32" ? /[\0\\:]/ : /\0/;
  if (linkName.startsWith("/") || up > depth || parts.slice(up).includes("..") || special.test(linkName)) {
    throw refused(name, `is a symbolic link to ${shown(linkName)}, which may be outside of the directory`);
  }
}

function refused(name: string, reason: string): UnexpectedAnswerError {
  return new UnexpectedAnswerError(`the download ends, because ${shown(name)} ${reason}`);
}

function shown(name: string): string {
  return JSON.stringify(Buffer.from(name, "latin1").toString());
}
