import { UnexpectedAnswerError } from "./errors.js";

// Reads and writes tar archives in the PAX format, which is the format of the server. Names are strings in which each
// character is one byte (latin1), because names in a sandbox need not be valid UTF-8.

const blockSize = 512;
/** The maximum size of the PAX records of an entry, which the server also has. */
const maxRecords = 1 << 20;

export type EntryType = "file" | "directory" | "symlink" | "link";

const typeFlags: Record<EntryType, string> = { file: "0", link: "1", symlink: "2", directory: "5" };

/** What an archive says about a file. */
export interface Header {
  /** The path, with / between its parts. */
  name: string;
  type: EntryType;
  /** The permissions. */
  mode: number;
  /** The size of the content in bytes; 0 unless it is a file. */
  size: number;
  /** The time of the last change, in seconds since 1970. */
  modified: number;
  /** Where a symbolic link leads, or the name of the file that a hard link repeats. */
  linkName: string;
}

/** A file in an archive. Its content must be read before the next entry. */
export interface Entry extends Header {
  content: AsyncIterable<Buffer>;
}

/** Returns the header of a file, which its content and padding(size) must follow. */
export function encodeHeader(header: Header): Buffer {
  const { name, type, mode, size, modified, linkName } = header;
  const records = [
    record("path", name, name.length > 100),
    record("linkpath", linkName, linkName.length > 100),
    record("size", String(size), size >= 8 ** 11),
  ].join("");
  const block = encodeBlock(name, typeFlags[type], mode, size, modified, linkName);
  if (records === "") return block;
  const extended = Buffer.from(records, "latin1");
  const first = encodeBlock("PaxHeaders", "x", 0o644, extended.length, 0, "");
  return Buffer.concat([first, extended, padding(extended.length), block]);
}

/** Returns the bytes between a content with this size and the next header. */
export function padding(size: number): Buffer {
  return Buffer.alloc((blockSize - (size % blockSize)) % blockSize);
}

/** The end of an archive. */
export const archiveEnd = Buffer.alloc(2 * blockSize);

/** Returns a PAX record, which begins with its own length. */
function record(key: string, value: string, needed: boolean): string {
  if (!needed) return "";
  const rest = ` ${key}=${value}\n`;
  let length = rest.length + 1;
  while (String(length).length + rest.length !== length) length = String(length).length + rest.length;
  return `${length}${rest}`;
}

function encodeBlock(
  name: string,
  type: string,
  mode: number,
  size: number,
  modified: number,
  linkName: string,
): Buffer {
  const block = Buffer.alloc(blockSize);
  const octal = (value: number, offset: number, length: number) => {
    // A value that is too large is also in a PAX record.
    const digits = Math.max(0, Math.floor(value))
      .toString(8)
      .padStart(length - 1, "0");
    block.write(digits.slice(-(length - 1)), offset, "latin1");
  };
  block.write(name.slice(0, 100), 0, "latin1");
  octal(mode, 100, 8);
  octal(0, 108, 8);
  octal(0, 116, 8);
  octal(size, 124, 12);
  octal(modified, 136, 12);
  block.write(type, 156, "latin1");
  block.write(linkName.slice(0, 100), 157, "latin1");
  block.write("ustar\u000000", 257, "latin1");
  block.write(`${checksum(block).toString(8).padStart(6, "0")}\u0000 `, 148, "latin1");
  return block;
}

/** Returns the sum of the bytes of a header, whose checksum counts as spaces. */
function checksum(block: Buffer): number {
  return block.reduce((sum, byte, i) => sum + (i >= 148 && i < 156 ? 0x20 : byte), 0);
}

/**
 * Yields the entries of an archive.
 *
 * @throws UnexpectedAnswerError if it is not an archive in the format of the server, or not complete
 */
export async function* decodeArchive(source: AsyncIterable<Uint8Array>): AsyncGenerator<Entry> {
  const reader = new Reader(source);
  let records = new Map<string, string>();
  for (;;) {
    const block = await reader.read(blockSize);
    if (block.every((byte) => byte === 0)) break;
    if (parseOctal(block, 148, 8) !== checksum(block)) throw malformed("a header has a wrong checksum");
    const flag = String.fromCharCode(block[156] ?? 0);
    const size = parseSize(records.get("size")) ?? parseOctal(block, 124, 12);
    if (flag === "x") {
      if (size > maxRecords) throw malformed("a header is too long");
      records = parseRecords(await reader.read(size));
      await reader.read(padding(size).length);
      continue;
    }
    const type = (Object.keys(typeFlags) as EntryType[]).find((type) => typeFlags[type] === flag);
    if (!type) throw malformed(`it has an entry of the type ${JSON.stringify(flag)}`);
    const body = new Body(reader, type === "file" ? size : 0);
    yield {
      name: records.get("path") ?? parseText(block, 0, 100),
      type,
      mode: parseOctal(block, 100, 8),
      size: body.size,
      modified: parseOctal(block, 136, 12),
      linkName: records.get("linkpath") ?? parseText(block, 157, 100),
      content: body,
    };
    for await (const _ of body);
    await reader.read(padding(body.size).length);
    records = new Map();
  }
  await reader.drain();
}

/** The content of an entry. It can be iterated again, which continues where the iteration ended. */
class Body implements AsyncIterable<Buffer> {
  readonly size: number;
  readonly #reader: Reader;
  #left: number;

  constructor(reader: Reader, size: number) {
    this.#reader = reader;
    this.size = this.#left = size;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Buffer> {
    while (this.#left > 0) {
      const piece = await this.#reader.readSome(this.#left);
      this.#left -= piece.length;
      yield piece;
    }
  }
}

/** Reads bytes from pieces of any size. */
class Reader {
  readonly #pieces: AsyncIterator<Uint8Array>;
  #rest: Buffer = Buffer.alloc(0);

  constructor(source: AsyncIterable<Uint8Array>) {
    this.#pieces = source[Symbol.asyncIterator]();
  }

  /** Returns between 1 and max bytes. */
  async readSome(max: number): Promise<Buffer> {
    while (this.#rest.length === 0) {
      const { value, done } = await this.#pieces.next();
      if (done) throw malformed("it is not complete");
      this.#rest = Buffer.from(value.buffer, value.byteOffset, value.byteLength);
    }
    const some = this.#rest.subarray(0, max);
    this.#rest = this.#rest.subarray(some.length);
    return some;
  }

  /** Returns exactly this number of bytes. */
  async read(length: number): Promise<Buffer> {
    const parts: Buffer[] = [];
    for (let left = length; left > 0;) {
      const part = await this.readSome(left);
      left -= part.length;
      parts.push(part);
    }
    return Buffer.concat(parts);
  }

  /** Reads everything that is left. */
  async drain(): Promise<void> {
    while (!(await this.#pieces.next()).done);
  }
}

function parseText(block: Buffer, offset: number, length: number): string {
  return block.toString("latin1", offset, offset + length).replace(/\0.*$/s, "");
}

function parseOctal(block: Buffer, offset: number, length: number): number {
  const text = parseText(block, offset, length).trim();
  if (!/^[0-7]*$/.test(text)) throw malformed("a header has a wrong number");
  return Number.parseInt(text || "0", 8);
}

function parseSize(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  if (!/^\d{1,15}$/.test(text)) throw malformed("a header has a wrong size");
  return Number(text);
}

function parseRecords(bytes: Buffer): Map<string, string> {
  const records = new Map<string, string>();
  for (let offset = 0; offset < bytes.length;) {
    const space = bytes.indexOf(" ", offset);
    const length = Number(bytes.toString("latin1", offset, Math.max(space, offset)));
    const text = bytes.toString("latin1", space + 1, offset + length);
    const equals = text.indexOf("=");
    if (!(length > 0) || offset + length > bytes.length || equals < 0 || !text.endsWith("\n")) {
      throw malformed("a header has a wrong record");
    }
    records.set(text.slice(0, equals), text.slice(equals + 1, -1));
    offset += length;
  }
  return records;
}

function malformed(reason: string): UnexpectedAnswerError {
  return new UnexpectedAnswerError(`the archive from the server cannot be read: ${reason}`);
}
