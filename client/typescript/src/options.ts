import type { Agent } from "node:http";

/** Options of every call. */
export interface CallOptions {
  /**
   * Ends the call: it throws the signal's reason, and what it runs on the server is ended, too.
   */
  signal?: AbortSignal | undefined;
}

/** Options of a run of code or of a program. */
export interface RunOptions extends CallOptions {
  /** Seconds after which it is interrupted; 0, or none, is the server's maximum. */
  timeout?: number | undefined;
}

/** What a sandbox is made of. The server's defaults are for what is left out. */
export interface StartOptions extends CallOptions {
  /** Such as microsandbox/python; otherwise that of the sandbox's language. */
  image?: string | undefined;
  /** MiB. */
  memory?: number | undefined;
  /** Virtual processors; rounded to the nearest integer. */
  cpus?: number | undefined;
  /** Environment variables for everything that runs in it: an object, or ["NAME=value"]. */
  envs?: Readonly<Record<string, string>> | readonly string[] | undefined;
  /** Absolute path in which runs begin. */
  workdir?: string | undefined;

  // A server that lacks one of these refuses the start and names it.

  /** Directories from without, as the server offers them. */
  volumes?: readonly string[] | undefined;
  /** Ports of its own that are to be reached from without. */
  ports?: readonly string[] | undefined;
  /** Names of sandboxes that must run before it. */
  dependsOn?: readonly string[] | undefined;
  /** The shell that its scripts are for. */
  shell?: string | undefined;
  /** Scripts that can be run in it, by their names. */
  scripts?: Readonly<Record<string, string>> | undefined;
  /** What is run in it as it starts. */
  exec?: string | undefined;

  /** Seconds to wait until it is ready, 180 if not given; after that, what was made so far is removed. */
  timeout?: number | undefined;
}

/** Options of a sandbox, and of its start. */
export interface SandboxOptions extends StartOptions {
  /**
   * https://HOST[:PORT], or http:// on this machine; otherwise MSB_SERVER_URL of the environment or of a .env
   * file in the working directory or above it, or http://127.0.0.1:5555.
   */
  serverUrl?: string | undefined;
  /** Otherwise the key's own, or default for a key that is not limited to one. */
  namespace?: string | undefined;
  /** 1 to 63 of A-Z a-z 0-9 - _; otherwise one is made up. */
  name?: string | undefined;
  /** Otherwise MSB_API_KEY of the environment or of a .env file in the working directory or above it. */
  apiKey?: string | undefined;
  /** Makes the connections, for proxies, client certificates and private authorities: an Agent of node:http(s). */
  agent?: Agent | undefined;
}

/** Collects SandboxOptions, one call for each. */
export class SandboxOptionsBuilder {
  readonly #options: SandboxOptions = {};

  serverUrl(serverUrl: string): this {
    return this.#set({ serverUrl });
  }

  namespace(namespace: string): this {
    return this.#set({ namespace });
  }

  name(name: string): this {
    return this.#set({ name });
  }

  apiKey(apiKey: string): this {
    return this.#set({ apiKey });
  }

  agent(agent: Agent): this {
    return this.#set({ agent });
  }

  image(image: string): this {
    return this.#set({ image });
  }

  memory(memory: number): this {
    return this.#set({ memory });
  }

  cpus(cpus: number): this {
    return this.#set({ cpus });
  }

  envs(envs: Readonly<Record<string, string>> | readonly string[]): this {
    return this.#set({ envs });
  }

  workdir(workdir: string): this {
    return this.#set({ workdir });
  }

  volumes(volumes: readonly string[]): this {
    return this.#set({ volumes });
  }

  ports(ports: readonly string[]): this {
    return this.#set({ ports });
  }

  dependsOn(dependsOn: readonly string[]): this {
    return this.#set({ dependsOn });
  }

  shell(shell: string): this {
    return this.#set({ shell });
  }

  scripts(scripts: Readonly<Record<string, string>>): this {
    return this.#set({ scripts });
  }

  exec(exec: string): this {
    return this.#set({ exec });
  }

  timeout(timeout: number): this {
    return this.#set({ timeout });
  }

  signal(signal: AbortSignal): this {
    return this.#set({ signal });
  }

  /** Returns the options collected so far. */
  build(): SandboxOptions {
    return { ...this.#options };
  }

  #set(options: SandboxOptions): this {
    Object.assign(this.#options, options);
    return this;
  }
}

export const SandboxOptions = {
  /** Begins SandboxOptions.builder().name("my-sandbox").memory(1024).build(). */
  builder: (): SandboxOptionsBuilder => new SandboxOptionsBuilder(),
};
