import "./dispose.js";
import {
  checkCallbacks,
  checkInput,
  checkInteger,
  checkOptionalStrings,
  checkOptions,
  checkString,
  checkStrings,
  encoded,
  programParams,
  seconds,
  unexpectedFormat,
} from "./check.js";
import {
  CommandExitError,
  ConflictError,
  InvalidParamsError,
  RequestTimeoutError,
  SandboxNotFoundError,
} from "./errors.js";
import { withReason } from "./execution.js";
import type { CallOptions, OutputCallback, ProgramOptions } from "./options.js";
import { Output, OutputCollector, PieceDecoder, type OutputPiece, type PieceData } from "./output.js";
import type { BaseSandbox } from "./sandbox.js";

/** Options of a process. */
export interface ProcessOptions extends ProgramOptions {
  /** The standard input, or its beginning. */
  stdin?: string | Uint8Array | undefined;
  /** Keep the standard input open for sendStdin(). */
  openStdin?: boolean | undefined;
  /** A name for the process; it need not be unique. */
  tag?: string | undefined;
  /** Seconds after which the process gets SIGTERM; 0 or undefined means that there is no time limit. */
  timeout?: number | undefined;
}

/** How a process has ended. */
export interface ProcessExit {
  /** 128+N if signal N ended the process. */
  exit_code: number;
  /** The name of the signal that ended the process, such as KILL. */
  signal?: string;
  /** Whether the process reached its time limit. */
  timed_out: boolean;
  /** Why the kernel killed the process, if memory ran out. */
  reason?: string;
}

/** What the server knows about a process. */
export interface ProcessInfo {
  pid: number;
  tag?: string;
  command: string;
  args: string[];
  cwd: string;
  user: string;
  /** Whether the process has a terminal. */
  terminal: boolean;
  /** The time of the start in UTC, such as 2026-01-02T03:04:05Z. */
  started_at: string;
  running: boolean;
  /** How much the process has printed. */
  output_bytes: number;
  /** Only of a process that has ended. */
  exit?: ProcessExit;
}

/** Options of a process's output. */
export interface ProcessOutputOptions extends CallOptions {
  /** Begin with the output that the server remembers, up to 1 MiB; the default is true. */
  replay?: boolean | undefined;
}

/** Options of waiting for a process. */
export interface WaitOptions extends CallOptions {
  /** Seconds to wait; 0 or undefined means no limit. */
  timeout?: number | undefined;
  /** Is called with each piece of standard output. */
  onStdout?: OutputCallback | undefined;
  /** Is called with each piece of standard error. */
  onStderr?: OutputCallback | undefined;
}

/** Options of a signal. */
export interface SignalOptions extends CallOptions {
  /** Send the signal to everything that the process has started, instead of to the process alone. */
  all?: boolean | undefined;
}

/** The output of a process, as the server sends it. */
interface OutputResult {
  output?: PieceData[];
  skipped_bytes?: number;
  running?: boolean;
  exit?: ProcessExit;
}

/** Bytes of input in one request. In base64, they are shorter than the limit on the body of a request. */
const inputSize = 512 << 10;

/** The output of a process, and how it has ended. */
export class ProcessExecution extends Output {
  readonly pid: number;
  /** Whether the process still runs. */
  readonly running: boolean;
  /** How it has ended; undefined if it runs. */
  readonly exit: ProcessExit | undefined;
  /** How many bytes the process had printed before this output. */
  readonly skippedBytes: number;
  readonly #output: OutputCollector;

  constructor(pid: number, output: OutputCollector, { running, exit, skipped_bytes }: OutputResult = {}) {
    super(output.lines);
    this.pid = pid;
    this.running = running ?? true;
    this.exit = exit;
    this.skippedBytes = skipped_bytes ?? 0;
    this.#output = output;
  }

  /** The exit code, which is 128+N if signal N ended the process; -1 if it still runs. */
  get exitCode(): number {
    return this.exit?.exit_code ?? -1;
  }

  /** Whether the exit code is 0. */
  get success(): boolean {
    return this.exitCode === 0;
  }

  /** The bytes of standard output. */
  get stdoutBytes(): Uint8Array {
    return this.#output.bytes("stdout");
  }

  /** The bytes of standard error. */
  get stderrBytes(): Uint8Array {
    return this.#output.bytes("stderr");
  }

  /** Returns the execution if the exit code is 0, and throws a CommandExitError otherwise. */
  raiseForStatus(): this {
    if (this.success) return this;
    throw new CommandExitError(withReason(`process ${this.pid}: exit code ${this.exitCode}`, this), this);
  }
}

/** A process that continues in a sandbox, whether or not a program is connected to it. */
export class Process implements AsyncDisposable {
  readonly pid: number;
  /** Its tag; undefined if it has none. */
  readonly tag: string | undefined;
  readonly #sandbox: BaseSandbox;
  /** Resolves when the input so far was sent. */
  #sent: Promise<unknown> = Promise.resolve();

  constructor(sandbox: BaseSandbox, pid: number, tag: string | undefined) {
    this.#sandbox = sandbox;
    this.pid = pid;
    this.tag = tag;
  }

  /**
   * Yields the output as it is printed, until the process ends. The process goes on if the iteration ends before.
   * While a program iterates slowly, the process waits.
   */
  async *output(options?: ProcessOutputOptions): AsyncGenerator<OutputPiece, void> {
    const { replay = true, signal } = checkOptions(options);
    const decoder = new PieceDecoder();
    for await (const { name, data } of this.#connect(replay, { signal })) {
      if (name === "output") yield decoder.decode(data);
    }
  }

  /**
   * Waits until the process has ended, and returns its output, beginning with what the server remembers, up to 1 MiB.
   *
   * @throws RequestTimeoutError if the process still runs after the timeout. Its execution has the output so far. The
   *   process goes on.
   */
  async wait(options?: WaitOptions): Promise<ProcessExecution> {
    const { timeout, signal, onStdout, onStderr } = checkOptions(options);
    checkCallbacks({ onStdout, onStderr });
    const output = new OutputCollector();
    const limit = seconds(timeout);
    try {
      for await (const { name, data } of this.#connect(true, { limit, signal })) {
        if (name === "output") {
          const { stream, text } = output.add(data);
          await (stream === "stdout" ? onStdout : onStderr)?.(text);
        } else if (name === "result") {
          return new ProcessExecution(this.pid, output, data as OutputResult);
        }
      }
    } catch (error) {
      if (!(error instanceof RequestTimeoutError)) throw error;
      const execution = new ProcessExecution(this.pid, output);
      throw new RequestTimeoutError(`process ${this.pid} still runs after ${limit} s`, { execution });
    }
    throw unexpectedFormat(`the output of process ${this.pid} has`);
  }

  /** Returns the last 1 MiB that the process has printed, or what the server remembers of it. */
  async logs({ signal }: CallOptions = {}): Promise<ProcessExecution> {
    const result = (await this.#call(
      "logs",
      { encoding: "base64" },
      { signal, idempotent: true },
    )) as OutputResult | null;
    if (!Array.isArray(result?.output)) throw unexpectedFormat(`the output of process ${this.pid} has`);
    const output = new OutputCollector();
    for (const piece of result.output) output.add(piece);
    return new ProcessExecution(this.pid, output, result);
  }

  /** Returns what the server knows about the process. */
  async info({ signal }: CallOptions = {}): Promise<ProcessInfo> {
    return toInfo(await this.#call("get", {}, { signal, idempotent: true }));
  }

  /**
   * Writes to the standard input, and returns when the process has accepted everything. Calls write in their order,
   * even if the program does not wait for them. The process must have been started with openStdin, or on a terminal.
   */
  async sendStdin(data: string | Uint8Array, { signal }: CallOptions = {}): Promise<void> {
    const input = checkInput("data", data);
    const bytes = typeof input === "string" ? Buffer.from(input) : input;
    await this.#inOrder(async () => {
      for (let offset = 0; offset < bytes.length; offset += inputSize) {
        await this.#call("input", encoded("data", bytes.subarray(offset, offset + inputSize)), { limit: 0, signal });
      }
    });
  }

  /** Closes the standard input after everything that was sent. */
  async closeStdin({ signal }: CallOptions = {}): Promise<void> {
    await this.#inOrder(() => this.#call("input", { close: true }, { limit: 0, signal }));
  }

  /** Sends a signal, such as "TERM", "SIGTERM" or 15. */
  async signal(signal: string | number, options?: SignalOptions): Promise<void> {
    const { all, signal: abort } = checkOptions(options);
    const name = typeof signal === "number" ? String(signal) : checkString("signal", signal);
    await this.#call("signal", { signal: name, all }, { signal: abort });
  }

  /** Kills the process and everything that it has started. It is not an error if the process has ended. */
  async kill({ signal }: CallOptions = {}): Promise<void> {
    try {
      await this.signal("KILL", { all: true, signal });
    } catch (error) {
      if (!(error instanceof ConflictError)) throw error;
    }
  }

  /** Kills the process at the end of an `await using` block. It is not an error if the sandbox has ended. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.kill();
    } catch (error) {
      if (!(error instanceof SandboxNotFoundError)) throw error;
    }
  }

  /** @internal Sets the size of the terminal. */
  async _resize(cols: number, rows: number, { signal }: CallOptions): Promise<void> {
    await this.#call("resize", { cols, rows }, { signal });
  }

  #connect(replay: boolean, options: { limit?: number | undefined; signal?: AbortSignal | undefined }) {
    const params = { pid: this.pid, replay, encoding: "base64" };
    return this.#sandbox._events("sandbox.process.connect", params, { ...options, idempotent: true });
  }

  #call(
    method: string,
    params: Record<string, unknown>,
    options: { limit?: number; idempotent?: boolean; signal?: AbortSignal | undefined },
  ): Promise<unknown> {
    return this.#sandbox._call(`sandbox.process.${method}`, { pid: this.pid, ...params }, options);
  }

  /** Calls a function after the input so far was sent. */
  #inOrder(send: () => Promise<unknown>): Promise<unknown> {
    const sent = this.#sent.then(send);
    this.#sent = sent.catch(() => {});
    return sent;
  }
}

/** The processes of a sandbox that go on in the background. */
export class Processes {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /** Starts a program without a shell. It continues until it exits, gets a signal, or the sandbox stops. */
  async start(command: string, args: readonly string[] = [], options?: ProcessOptions): Promise<Process> {
    const given = checkOptions(options);
    const params = { open_stdin: given.openStdin ?? undefined, ...encoded("stdin", given.stdin) };
    const pid = await startProcess(this.#sandbox, command, args, params, given);
    return new Process(this.#sandbox, pid, given.tag);
  }

  /** Returns a process that was started before, by its pid or by its tag. */
  async connect(process: number | string, { signal }: CallOptions = {}): Promise<Process> {
    const { pid, tag } = await findProcess(this.#sandbox, process, signal);
    return new Process(this.#sandbox, pid, tag);
  }

  /** Returns the processes that run, and the last 64 that have ended, in the order of their start. */
  async list({ signal }: CallOptions = {}): Promise<ProcessInfo[]> {
    const result = (await this.#sandbox._call("sandbox.process.list", {}, { idempotent: true, signal })) as {
      processes?: unknown;
    } | null;
    if (!Array.isArray(result?.processes)) throw unexpectedFormat("the list of processes has");
    return result.processes.map(toInfo);
  }
}

/** Starts a process, and returns its pid. params are further members of params. */
export async function startProcess(
  sandbox: BaseSandbox,
  command: string,
  args: readonly string[],
  params: Record<string, unknown>,
  options: ProgramOptions & { tag?: string | undefined; timeout?: number | undefined },
): Promise<number> {
  checkString("command", command);
  checkStrings("args", args, "-l");
  const { signal, tag, timeout } = options;
  checkOptionalStrings({ tag });
  const result = (await sandbox._call(
    "sandbox.process.start",
    { command, args, tag: tag ?? undefined, timeout: seconds(timeout), ...programParams(options), ...params },
    { signal },
  )) as { pid?: unknown } | null;
  if (typeof result?.pid !== "number") throw unexpectedFormat("the description of the process has");
  return result.pid;
}

/** Returns what the server knows about a process, by its pid or by its tag. */
export async function findProcess(
  sandbox: BaseSandbox,
  process: number | string,
  signal: AbortSignal | undefined,
): Promise<ProcessInfo> {
  if (typeof process !== "number" && typeof process !== "string") {
    throw new InvalidParamsError(`the process must be a pid or a tag, not ${String(process)}`);
  }
  const params =
    typeof process === "number"
      ? { pid: checkInteger("pid", process, 1, 2 ** 31 - 1) }
      : { tag: checkString("tag", process) };
  return toInfo(await sandbox._call("sandbox.process.get", params, { idempotent: true, signal }));
}

function toInfo(info: unknown): ProcessInfo {
  if (typeof (info as ProcessInfo | null)?.pid !== "number")
    throw unexpectedFormat("the description of the process has");
  return info as ProcessInfo;
}
