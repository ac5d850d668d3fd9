import type { Execution } from "./execution.js";
import type { CodeOptions, SandboxOptions } from "./options.js";
import { BaseSandbox } from "./sandbox.js";

/** A sandbox that runs JavaScript with Node.js. */
export class NodeSandbox extends BaseSandbox {
  /**
   * Creates a sandbox and starts it. For the options and errors, see the constructor and start().
   *
   *     await using sandbox = await NodeSandbox.create({ name: "my-sandbox" });
   *     const execution = await sandbox.run("6 * 7");
   *     console.log(execution.stdout);
   */
  static override create(options?: SandboxOptions): Promise<NodeSandbox> {
    // In a subclass, this is the subclass. If create is called as a bare function, this is not a class.
    return BaseSandbox.createBase(typeof this === "function" ? this : NodeSandbox, options);
  }

  async getDefaultImage(): Promise<string> {
    return "microsandbox/node";
  }

  async run(code: string, options?: CodeOptions): Promise<Execution> {
    return this._runCode(this._language, code, options);
  }

  /** @internal */
  override get _language(): string {
    return "nodejs";
  }
}
