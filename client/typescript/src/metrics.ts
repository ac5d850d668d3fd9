import { SandboxNotFoundError } from "./errors.js";
import type { SandboxState } from "./list.js";
import type { CallOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** The resource usage of a sandbox. The usages are null if it is not running, or if they could not be measured. */
export interface SandboxMetrics {
  namespace: string;
  name: string;
  state: SandboxState;
  /** Why the sandbox failed; only of a failed one. */
  reason?: string;
  running: boolean;
  /** Percent of one processor. */
  cpu_usage: number | null;
  /** MiB. */
  memory_usage: number | null;
  /** Bytes. */
  disk_usage: number | null;
}

/** The resource usage of a sandbox. Each method requests it from the server. */
export class Metrics {
  readonly #sandbox: BaseSandbox;

  constructor(sandbox: BaseSandbox) {
    this.#sandbox = sandbox;
  }

  /**
   * Returns all metrics.
   *
   * @throws SandboxNotFoundError if the sandbox does not exist, NotStartedError, the errors of the connection, and
   *   the signal's reason
   */
  all(options: CallOptions = {}): Promise<SandboxMetrics> {
    return this.#sandbox._metrics(options);
  }

  /** Returns the CPU usage, in percent of one processor; undefined if the sandbox is not running. */
  async cpu(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).cpu_usage ?? undefined;
  }

  /** Returns the memory usage, in MiB; undefined if the sandbox is not running. */
  async memory(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).memory_usage ?? undefined;
  }

  /** Returns the disk usage, in bytes; undefined if the sandbox is not running. */
  async disk(options?: CallOptions): Promise<number | undefined> {
    return (await this.all(options)).disk_usage ?? undefined;
  }

  /** Reports whether the sandbox is running. False if it does not exist. */
  async isRunning(options?: CallOptions): Promise<boolean> {
    try {
      return (await this.all(options)).running;
    } catch (error) {
      if (error instanceof SandboxNotFoundError) return false;
      throw error;
    }
  }
}
