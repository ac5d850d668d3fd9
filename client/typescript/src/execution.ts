import { CodeError, CommandExitError } from "./errors.js";
import { Output, OutputCollector, type OutputLine, type PieceData } from "./output.js";
import { Result, type ResultData } from "./result.js";

/** An exception that code has thrown. */
export interface ExceptionData {
  /** The name of its class, such as ZeroDivisionError. */
  name: string;
  /** Its message. */
  value: string;
  traceback: string;
}

/** The result of a run, as the server sends it. */
export interface OutputData {
  output?: PieceData[];
  status?: string;
  language?: string;
  success?: boolean;
  exit_code?: number;
  count?: number;
  state_lost?: boolean;
  results?: ResultData[];
  error?: ExceptionData;
  command?: string;
  args?: string[];
  truncated?: boolean;
}

/** Returns the output in a result that is not a stream. */
function collect(data: OutputData): OutputCollector {
  const output = new OutputCollector();
  for (const piece of data.output ?? []) {
    // An element of text is a line; one of base64 is a piece.
    if (piece.base64 === undefined) output.lines.push({ stream: "stdout", ...piece } as OutputLine);
    else output.add(piece);
  }
  return output;
}

/** The output and the results of a run of code. */
export class Execution extends Output {
  /** success, or error if the code threw an exception or ended with an exit code other than 0. */
  readonly status: string;
  /** The language of the code. */
  readonly language: string;
  /** The values that the code has shown. The last one is that of the last expression, if it has a value. */
  readonly results: Result[];
  /** The exception that the code threw; undefined if there is none. */
  readonly exception: ExceptionData | undefined;
  /** 0, or 1 after an exception, or the argument of sys.exit or process.exit; -1 if it is not known. */
  readonly exitCode: number;
  /** How many runs the interpreter has begun. */
  readonly count: number | undefined;
  /** Whether the interpreter ended, and its variables are lost. */
  readonly stateLost: boolean;

  /**
   * Parses a result of sandbox.repl.run. The text of its results counts as standard output, and the traceback of its
   * exception as standard error. streamed is the output of a stream, which already contains both.
   */
  constructor(data: OutputData = {}, streamed?: OutputLine[]) {
    const results = (data.results ?? []).map((result) => new Result(result));
    const output = collect(data);
    for (const { text } of results) output.addLines("stdout", text ?? "");
    output.addLines("stderr", data.error?.traceback ?? "");
    super(streamed ?? output.lines, data.truncated);
    this.results = results;
    this.status = data.status ?? "unknown";
    this.language = data.language ?? "unknown";
    this.exception = data.error;
    this.exitCode = data.exit_code ?? -1;
    this.count = data.count;
    this.stateLost = data.state_lost ?? false;
  }

  /** The last PNG that the code has shown, as base64; undefined if there is none. */
  get png(): string | undefined {
    return this.results
      .map(({ png }) => png)
      .filter((png) => png !== undefined)
      .at(-1);
  }

  /** Reports whether the code threw an exception or printed to standard error. */
  hasError(): boolean {
    return this.status === "error" || this.lines.some((line) => line.stream === "stderr" && line.text !== "");
  }

  /** Returns the execution if the code succeeded, and throws a CodeError otherwise. */
  raiseForStatus(): this {
    if (this.status !== "error") return this;
    const { exception, exitCode } = this;
    const message = exception ? `${exception.name}: ${exception.value}` : withReason(`exit code ${exitCode}`, this);
    throw new CodeError(message, this);
  }
}

/** The exit code and the output of a command. */
export class CommandExecution extends Output {
  /** The program that ran. */
  readonly command: string;
  readonly args: string[];
  /** The exit code of the program. */
  readonly exitCode: number;
  /** Whether the exit code is 0. */
  readonly success: boolean;
  /** The bytes of standard output; undefined unless the option binary was set. */
  readonly stdoutBytes: Uint8Array | undefined;
  /** The bytes of standard error; undefined unless the option binary was set. */
  readonly stderrBytes: Uint8Array | undefined;

  /** Parses a result of sandbox.command.run. streamed is the output of a stream. */
  constructor(data: OutputData = {}, streamed?: OutputCollector, binary = false) {
    const output = streamed ?? collect(data);
    super(output.lines, data.truncated);
    this.command = data.command ?? "";
    this.args = data.args ?? [];
    this.exitCode = data.exit_code ?? -1;
    this.success = data.success ?? false;
    this.stdoutBytes = binary ? output.bytes("stdout") : undefined;
    this.stderrBytes = binary ? output.bytes("stderr") : undefined;
  }

  /** Returns the execution if the exit code is 0, and throws a CommandExitError otherwise. */
  raiseForStatus(): this {
    if (this.success) return this;
    throw new CommandExitError(withReason(`${this.command}: exit code ${this.exitCode}`, this), this);
  }
}

/** Adds the last line on standard error to a message. */
export function withReason(message: string, { stderr }: Output): string {
  const reason = stderr.split("\n").at(-1)?.trim();
  return reason ? `${message}: ${reason}` : message;
}
