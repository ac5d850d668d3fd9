import { checkInteger, checkOptions } from "./check.js";
import { ConflictError } from "./errors.js";
import type { CallOptions, ProgramOptions } from "./options.js";
import { findProcess, Process, startProcess } from "./process.js";
import type { BaseSandbox } from "./sandbox.js";

/** Options of a process on a terminal. */
export interface PtyOptions extends ProgramOptions {
  /** The width of the terminal in characters; the default is 80. */
  cols?: number | undefined;
  /** The height of the terminal in characters; the default is 24. */
  rows?: number | undefined;
  /** A name for the process; it need not be unique. */
  tag?: string | undefined;
  /** Seconds after which the process gets SIGTERM; 0 or undefined means that there is no time limit. */
  timeout?: number | undefined;
}

/**
 * A process on a terminal. Its output is what the program writes to the terminal, also by escape sequences; use the
 * bytes of the pieces.
 */
export class PtyProcess extends Process {
  /** Sends what a user types. Calls send in their order, even if the program does not wait for them. */
  sendInput(data: string | Uint8Array, options?: CallOptions): Promise<void> {
    return this.sendStdin(data, options);
  }

  /** Sets the size of the terminal. The programs on it get SIGWINCH. */
  async resize(cols: number, rows: number, options: CallOptions = {}): Promise<void> {
    await this._resize(...checkSize(cols, rows), options);
  }
}

/** Starts programs on a terminal. */
export class Pty {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /** Starts a program on a terminal, which continues until the program exits, gets a signal, or the sandbox stops. */
  async start(command = "bash", args: readonly string[] = [], options?: PtyOptions): Promise<PtyProcess> {
    const given = checkOptions(options);
    const [cols, rows] = checkSize(given.cols ?? 80, given.rows ?? 24);
    const pid = await startProcess(this.#sandbox, command, args, { terminal: { cols, rows } }, given);
    return new PtyProcess(this.#sandbox, pid, given.tag);
  }

  /** Returns a process on a terminal that was started before, by its pid or by its tag. */
  async connect(process: number | string, { signal }: CallOptions = {}): Promise<PtyProcess> {
    const { pid, tag, terminal } = await findProcess(this.#sandbox, process, signal);
    if (!terminal) throw new ConflictError(`process ${pid} has no terminal: connect to it with process.connect()`);
    return new PtyProcess(this.#sandbox, pid, tag);
  }
}

function checkSize(cols: number, rows: number): [number, number] {
  return [checkInteger("cols", cols, 1, 65_535), checkInteger("rows", rows, 1, 65_535)];
}
