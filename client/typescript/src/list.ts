import { checkNotEmpty, checkOptions, unexpectedFormat } from "./check.js";
import { loadConfig } from "./config.js";
import type { CallOptions, ServerOptions } from "./options.js";
import { Server } from "./server.js";

/** The state of a sandbox. Newer servers may have more states. */
export type SandboxState = "starting" | "running" | "stopping" | "failed" | (string & {});

/** What the server knows about a sandbox. */
export interface SandboxInfo {
  namespace: string;
  name: string;
  /** Differs for each start of the sandbox. */
  id: string;
  state: SandboxState;
  /** Why the sandbox failed; only of a failed one. */
  reason?: string;
  image: string;
  /** Virtual processors. */
  cpus: number;
  /** MiB. */
  memory: number;
  /** The size of the writable disk in MiB; only if it is limited. */
  disk?: number;
  /** The time of the start in UTC, such as 2026-01-02T03:04:05Z. */
  created_at: string;
  /** How the sandbox was started; not while it starts, and not if an earlier version of the server started it. */
  started_from?: { source: "pool" | "template" | "cold" | (string & {}); why?: string };
}

/** Options of listSandboxes. */
export interface ListOptions extends ServerOptions, CallOptions {
  /**
   * The namespace; the default is the key's namespace, or default for a key that is not limited to one. "*" means all
   * namespaces of the key.
   */
  namespace?: string | undefined;
}

/** Seconds to wait for the answer to a query. */
export const queryLimit = 30;

/**
 * Returns all sandboxes of a namespace, in whatever state they are, sorted by namespace and name.
 *
 * @throws ConfigError if the server's URL, the key or a .env file cannot be used, the errors of the server and the
 *   connection, and the signal's reason
 */
export async function listSandboxes(options?: ListOptions): Promise<SandboxInfo[]> {
  const { namespace, agent, signal, ...access } = checkOptions(options);
  checkNotEmpty({ namespace });
  const server = new Server(loadConfig(access), agent);
  const all: SandboxInfo[] = [];
  for (let after: string | undefined; ;) {
    const result = (await server.call({
      method: "sandbox.list",
      params: { namespace: namespace ?? undefined, after },
      limit: queryLimit,
      idempotent: true,
      signal,
    })) as { sandboxes?: SandboxInfo[]; next?: string } | null;
    if (!Array.isArray(result?.sandboxes)) throw unexpectedFormat("the list has");
    all.push(...result.sandboxes);
    if (!result.next || result.next <= (after ?? "")) return all;
    after = result.next;
  }
}
