/** A line of what a run printed, without the newline at its end. */
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

/** What a run printed. */
class Output {
  /** The lines in their order, of both streams. */
  readonly lines: OutputLine[];

  constructor(data: OutputData = {}) {
    this.lines = data.output ?? [];
  }

  /** What it printed to its standard output, without white space at the end. */
  get stdout(): string {
    return this.#text("stdout");
  }

  /** What it printed to its standard error, without white space at the end. */
  get stderr(): string {
    return this.#text("stderr");
  }

  /** What it printed to its standard output, without white space around. It is here already; nothing is waited for. */
  async output(): Promise<string> {
    return this.stdout.trim();
  }

  /** What it printed to its standard error, without white space around. It is here already; nothing is waited for. */
  async error(): Promise<string> {
    return this.stderr.trim();
  }

  #text(stream: OutputLine["stream"]): string {
    const lines = this.lines.filter((line) => line.stream === stream);
    return lines
      .map((line) => line.text)
      .join("\n")
      .trimEnd();
  }
}

/** How a run of code ended, and what it printed. */
export class Execution extends Output {
  /** success, or error when the code raised. */
  readonly status: string;
  /** The language that the code is in. */
  readonly language: string;

  /** Reads the result of sandbox.repl.run. */
  constructor(data: OutputData = {}) {
    super(data);
    this.status = data.status ?? "unknown";
    this.language = data.language ?? "unknown";
  }

  /** Says whether the code raised, or printed to its standard error. */
  hasError(): boolean {
    return this.status === "error" || this.lines.some((line) => line.stream === "stderr" && line.text !== "");
  }
}

/** How a command ended, and what it printed. */
export class CommandExecution extends Output {
  /** The program that ran. */
  readonly command: string;
  readonly args: string[];
  /** The code with which it ended. */
  readonly exitCode: number;
  /** Whether that code is 0. */
  readonly success: boolean;

  /** Reads the result of sandbox.command.run. */
  constructor(data: OutputData = {}) {
    super(data);
    this.command = data.command ?? "";
    this.args = data.args ?? [];
    this.exitCode = data.exit_code ?? -1;
    this.success = data.success ?? false;
  }
}
