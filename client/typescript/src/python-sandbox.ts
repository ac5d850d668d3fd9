import type { Execution } from "./execution.js";
import type { CodeOptions, SandboxOptions } from "./options.js";
import { BaseSandbox } from "./sandbox.js";

/** A sandbox that runs Python. */
export class PythonSandbox extends BaseSandbox {
  /**
   * Creates a sandbox and starts it. For the options and errors, see the constructor and start().
   *
   *     await using sandbox = await PythonSandbox.create({ name: "my-sandbox" });
   *     const execution = await sandbox.run("6 * 7");
   *     console.log(execution.stdout);
   */
  static override create(options?: SandboxOptions): Promise<PythonSandbox> {
    // In a subclass, this is the subclass. If create is called as a bare function, this is not a class.
    return BaseSandbox.createBase(typeof this === "function" ? this : PythonSandbox, options);
  }

  async getDefaultImage(): Promise<string> {
    return "microsandbox/python";
  }

  async run(code: string, options?: CodeOptions): Promise<Execution> {
    return this._runCode(this._language, code, options);
  }

  /** @internal */
  override get _language(): string {
    return "python";
  }
}
