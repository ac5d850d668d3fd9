// A program's directory, into which what npm would publish is installed.

import { execFile } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, realpathSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const root = fileURLToPath(new URL("..", import.meta.url));
const run = promisify(execFile);

/** What a program printed, and how it ended. */
export interface Ended {
  stdout: string;
  stderr: string;
  code: number;
}

export class Consumer implements Disposable {
  readonly directory = realpathSync(mkdtempSync(join(tmpdir(), "msb-consumer-")));
  /** The paths of the files in the tarball. */
  files: string[] = [];
  /** The sizes of the tarball and of what is in it, in bytes. */
  size = 0;
  unpackedSize = 0;

  static async install(): Promise<Consumer> {
    const consumer = new Consumer();
    const { directory } = consumer;
    const packed = await run("npm", ["pack", "--json", "--silent", "--pack-destination", directory], { cwd: root });
    const [tarball] = JSON.parse(packed.stdout.slice(packed.stdout.indexOf("[\n")));
    consumer.files = tarball.files.map(({ path }: { path: string }) => path);
    consumer.size = tarball.size;
    consumer.unpackedSize = tarball.unpackedSize;
    consumer.write("package.json", '{ "private": true }');
    await run("npm", ["install", "--offline", "--no-audit", "--no-fund", `./${tarball.filename}`], { cwd: directory });
    // The types of Node.js are there already; all else is the tarball's.
    mkdirSync(join(directory, "node_modules/@types"));
    symlinkSync(join(root, "node_modules/@types/node"), join(directory, "node_modules/@types/node"));
    return consumer;
  }

  write(name: string, text: string): void {
    mkdirSync(dirname(join(this.directory, name)), { recursive: true });
    writeFileSync(join(this.directory, name), text);
  }

  /** Brings the files of a directory beside the tests. */
  copy(from: URL): void {
    cpSync(fileURLToPath(from), this.directory, { recursive: true });
  }

  /** Compiles programs in place; what is wrong with them is in stdout. */
  tsc(...args: string[]): Promise<Ended> {
    return this.node(join(root, "node_modules/typescript/bin/tsc"), args);
  }

  /** Runs a program, with nothing of the environment but what it is given. */
  async node(program: string, args: string[] = [], env: Record<string, string> = {}): Promise<Ended> {
    const options = { cwd: this.directory, env: { PATH: process.env.PATH, ...env }, timeout: 100_000 };
    return run(process.execPath, [program, ...args], options).then(
      ({ stdout, stderr }) => ({ stdout, stderr, code: 0 }),
      (error: Ended & { killed: boolean }) => {
        if (error.killed) throw new Error(`${program} did not end`);
        return error;
      },
    );
  }

  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true });
  }
}
