/** A line of a run's output, without the newline. */
export interface OutputLine {
  stream: "stdout" | "stderr";
  text: string;
}

/** The result of a run, as the server sends it. */
export interface OutputData {
  output?: OutputLine[];
  status?: string;
  language?: string;
  success?: boolean;
  exit_code?: number;
  command?: string;
  args?: string[];
}

/** The output of a run. */
class Output {
  /** The lines of both streams, in the order in which they were printed. */
  readonly lines: OutputLine[];

  constructor(data: OutputData = {}) {
    this.lines = data.output ?? [];
  }

  /** The standard output, without trailing white space. */
  get stdout(): string {
    return this.#select("stdout");
  }

  /** The standard error, without trailing white space. */
  get stderr(): string {
    return this.#select("stderr");
  }

  /** Both, in the order of lines, without trailing white space. */
  get text(): string {
    return this.#select("stdout", "stderr");
  }

  /** Returns text. */
  toString(): string {
    return this.text;
  }

  /** The standard output, without surrounding white space. It does not wait; the original SDK made it async. */
  async output(): Promise<string> {
    return this.stdout.trim();
  }

  /** The standard error, without surrounding white space. It does not wait; the original SDK made it async. */
  async error(): Promise<string> {
    return this.stderr.trim();
  }

  #select(...streams: OutputLine["stream"][]): string {
    const lines = this.lines.filter((line) => streams.includes(line.stream));
    return lines
      .map((line) => line.text)
      .join("\n")
      .trimEnd();
  }
}

/** The status and the output of a run of code. */
export class Execution extends Output {
  /** success, or error if the code threw an exception. */
  readonly status: string;
  /** The language of the code. */
  readonly language: string;

  /** Parses a result of sandbox.repl.run. */
  constructor(data: OutputData = {}) {
    super(data);
    this.status = data.status ?? "unknown";
    this.language = data.language ?? "unknown";
  }

  /** Reports whether the code threw an exception or printed to standard error. */
  hasError(): boolean {
    return this.status === "error" || this.lines.some((line) => line.stream === "stderr" && line.text !== "");
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

  /** Parses a result of sandbox.command.run. */
  constructor(data: OutputData = {}) {
    super(data);
    this.command = data.command ?? "";
    this.args = data.args ?? [];
    this.exitCode = data.exit_code ?? -1;
    this.success = data.success ?? false;
  }
}
