// A directory for a test program, into which the package is installed as the README says.

import { execFile } from "node:child_process";
import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const root = fileURLToPath(new URL("..", import.meta.url));
const run = promisify(execFile);

/** The README's commands to run in the checkout, and then in the project. */
const [pack = "", install = ""] =
  /^```sh\n(.*?)^```$/ms.exec(readFileSync(join(root, "README.md"), "utf8"))?.[1]?.split("\n\n") ?? [];

function bash(commands: string, cwd: string, env: Record<string, string>): Promise<unknown> {
  const common = { npm_config_audit: "false", npm_config_fund: "false", npm_config_loglevel: "error" };
  return run("bash", ["-ec", commands], { cwd, env: { ...process.env, ...common, ...env } });
}

/** The output and the exit code of a program. */
export interface ProgramResult {
  stdout: string;
  stderr: string;
  code: number;
}

export class Consumer implements Disposable {
  readonly directory = realpathSync(mkdtempSync(join(tmpdir(), "msb-consumer-")));
  /** Where the package is installed. */
  readonly installed = join(this.directory, "node_modules/microsandbox");
  /** The paths of the files in the tarball. */
  files: string[] = [];
  /** The size of the tarball, in bytes. */
  size = 0;

  /** Installs the package: with fresh, from a new checkout, otherwise from this one, which has its dependencies. */
  static async install({ fresh = false } = {}): Promise<Consumer> {
    const consumer = new Consumer();
    const { directory, installed } = consumer;
    const checkout = join(directory, "checkout");
    const destination = join(checkout, "client/typescript");
    if (fresh) {
      const generated = /^(node_modules|dist|.*\.tgz)$/;
      cpSync(root, destination, { recursive: true, filter: (path) => !generated.test(basename(path)) });
      // check.sh has already filled npm's cache.
      await bash(pack, checkout, { npm_config_prefer_offline: "true" });
    } else {
      mkdirSync(destination, { recursive: true });
      await bash(pack.replace("npm ci", ""), join(root, "../.."), { npm_config_pack_destination: destination });
    }
    consumer.write("package.json", '{ "private": true }');
    await bash(install.replaceAll("CHECKOUT", checkout), directory, { npm_config_prefer_offline: "true" });
    const [tarball = ""] = readdirSync(destination).filter((name) => name.endsWith(".tgz"));
    consumer.size = statSync(join(destination, tarball)).size;
    consumer.files = readdirSync(installed, { recursive: true, encoding: "utf8" }).filter((path) =>
      statSync(join(installed, path)).isFile(),
    );
    // Everything is from the tarball, except the types of Node.js, which are already installed here.
    mkdirSync(join(directory, "node_modules/@types"));
    symlinkSync(join(root, "node_modules/@types/node"), join(directory, "node_modules/@types/node"));
    return consumer;
  }

  write(name: string, text: string): void {
    mkdirSync(dirname(join(this.directory, name)), { recursive: true });
    writeFileSync(join(this.directory, name), text);
  }

  /** Copies the files of a directory into the program's directory. */
  copy(from: URL): void {
    cpSync(fileURLToPath(from), this.directory, { recursive: true });
  }

  /** Compiles programs in place. stdout contains the compiler's errors. */
  tsc(...args: string[]): Promise<ProgramResult> {
    return this.node(join(root, "node_modules/typescript/bin/tsc"), args);
  }

  /** Runs a program. Its environment contains only PATH and env. */
  async node(program: string, args: string[] = [], env: Record<string, string> = {}): Promise<ProgramResult> {
    const options = { cwd: this.directory, env: { PATH: process.env.PATH, ...env }, timeout: 250_000 };
    return run(process.execPath, [program, ...args], options).then(
      ({ stdout, stderr }) => ({ stdout, stderr, code: 0 }),
      (error: ProgramResult & { killed: boolean }) => {
        if (error.killed) throw new Error(`${program} did not end`);
        return error;
      },
    );
  }

  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true });
  }
}
