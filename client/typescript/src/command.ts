import { CommandExecution } from "./execution.js";
import type { RunOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** Runs programs in a sandbox. */
export class Command {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /**
   * Runs a program without a shell. To run a shell command line, run sh with ["-c", line]. An exit code other than
   * 0 is not an error.
   *
   * @param options seconds after which the program is killed, or RunOptions
   * @throws CommandNotFoundError if the sandbox has no such program, CommandNotExecutableError if it cannot be run,
   *   RunTimeoutError after the timeout, NotStartedError, the errors of the connection, and the signal's reason
   */
  async run(command: string, args: readonly string[] = [], options?: number | RunOptions): Promise<CommandExecution> {
    const limits = typeof options === "number" ? { timeout: options } : options;
    return new CommandExecution(await this.#sandbox._run("sandbox.command.run", { command, args }, limits));
  }
}
