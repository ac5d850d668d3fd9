import { SandboxNotFoundError } from "./errors.js";
import type { CallOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** What a sandbox uses. The usages are null for a sandbox that does not run. */
export interface SandboxMetrics {
  namespace: string;
  name: string;
  running: boolean;
  /** Percent of one processor. */
  cpu_usage: number | null;
  /** MiB. */
  memory_usage: number | null;
  /** Bytes. */
  disk_usage: number | null;
}

/** Asks what a sandbox uses, at each call anew. */
export class Metrics {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /**
   * All metrics at once.
   *
   * @throws SandboxNotFoundError when the sandbox is gone, NotStartedError, the errors of the connection, and
   *   the signal's reason
   */
  all(options: CallOptions = {}): Promise<SandboxMetrics> {
    return this.#sandbox._metrics(options);
  }

  /** The processor time that it uses, in percent of one processor; undefined if it does not run. */
  async cpu(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).cpu_usage ?? undefined;
  }

  /** The memory that it uses, in MiB; undefined if it does not run. */
  async memory(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).memory_usage ?? undefined;
  }

  /** The disk space that it uses, in bytes; undefined if it does not run. */
  async disk(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).disk_usage ?? undefined;
  }

  /** Whether the sandbox runs. */
  async isRunning(options?: CallOptions): Promise<boolean> {
    try {
      return (await this.all(options)).running;
    } catch (error) {
      if (error instanceof SandboxNotFoundError) return false;
      throw error;
    }
  }
}
