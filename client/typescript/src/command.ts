import { checkOptions, checkString, checkStrings } from "./check.js";
import { CommandExecution } from "./execution.js";
import type { CommandOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** Runs programs in a sandbox. */
export class Command {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /**
   * Runs a program without a shell. To run a shell command line, run sh with ["-c", line]. An exit code other than
   * 0 is not an error; use raiseForStatus() to throw it as a CommandExitError.
   *
   * @param options seconds after which the program is killed, or CommandOptions
   * @throws CommandNotFoundError if the sandbox has no such program, CommandNotExecutableError if it cannot be run,
   *   RunTimeoutError after the timeout, NotStartedError, the errors of the connection, and the signal's reason. The
   *   error's execution has what the program had printed before.
   */
  async run(
    command: string,
    args: readonly string[] = [],
    options?: number | CommandOptions,
  ): Promise<CommandExecution> {
    checkString("command", command);
    checkStrings("args", args, "-l");
    const given: CommandOptions = typeof options === "number" ? { timeout: options } : checkOptions(options);
    return this.#sandbox._run("sandbox.command.run", { command, args }, given, (data, streamed) => {
      return new CommandExecution(data, streamed, given.binary);
    });
  }
}
