import type { Agent } from "node:http";
import type { Context } from "./contexts.js";
import type { Result } from "./result.js";

/** Options of every call. */
export interface CallOptions {
  /**
   * Aborts the call: the call throws the signal's reason, and the server ends its run.
   */
  signal?: AbortSignal | undefined;
}

/** Environment variables: an object, or ["NAME=value"]. */
export type Envs = Readonly<Record<string, string>> | readonly string[];

/** Options of everything that runs in a sandbox. */
export interface ProgramOptions extends CallOptions {
  /** The working directory; a relative path begins at the workdir of the sandbox. */
  cwd?: string | undefined;
  /** Environment variables, in addition to those of the sandbox. */
  envs?: Envs | undefined;
  /** A name or number in the sandbox, optionally with : and a group; the default is the user of the sandbox. */
  user?: string | undefined;
}

/**
 * A function that is called with each piece of output. The run waits until it returns, or until its promise is
 * resolved. If it throws an error, the run ends, and throws that error.
 */
export type OutputCallback = (text: string) => unknown;

/** Options of a run of code or of a program. */
export interface RunOptions extends ProgramOptions {
  /** Seconds after which the run is interrupted; 0 or undefined means the server's maximum. */
  timeout?: number | undefined;
  /** The standard input. Without it, there is none. */
  stdin?: string | Uint8Array | undefined;
  /** Is called with each piece of standard output as it is printed. A piece need not be a line. */
  onStdout?: OutputCallback | undefined;
  /** Is called with each piece of standard error as it is printed. */
  onStderr?: OutputCallback | undefined;
}

/** Options of a run of code. */
export interface CodeOptions extends RunOptions {
  /** The language: python, node or bash; the default is the language of the sandbox. */
  language?: string | undefined;
  /** The context to run in, or its name; the default is the context of the language. */
  context?: Context | string | undefined;
  /** Is called with each value as the code shows it. */
  onResult?: ((result: Result) => unknown) | undefined;
}

/** Options of a run of a program. */
export interface CommandOptions extends RunOptions {
  /** Sets stdoutBytes and stderrBytes of the result, for output that is not text. */
  binary?: boolean | undefined;
}

/** The configuration of a sandbox. The server's defaults apply to options that are not given. */
export interface StartOptions extends CallOptions {
  /** Name of the image, such as microsandbox/python; the default is the image of the sandbox's language. */
  image?: string | undefined;
  /** Memory in MiB. */
  memory?: number | undefined;
  /** Virtual processors; rounded to the nearest integer. */
  cpus?: number | undefined;
  /** Size of the writable disk in MiB. */
  disk?: number | undefined;
  /** Environment variables for everything that runs in the sandbox: an object, or ["NAME=value"]. */
  envs?: Envs | undefined;
  /** Working directory of runs, an absolute path. It is created if it does not exist. */
  workdir?: string | undefined;
  /**
   * User of everything that runs in the sandbox and names no user itself: a name or number in the sandbox, optionally
   * with : and a group; the default is the user of the image.
   */
  user?: string | undefined;
  /** Hostname of the sandbox: 1 to 63 letters, digits and -; the default is sandbox. */
  hostname?: string | undefined;

  // A server that does not support one of these options refuses the start and names the option.

  /** Directories outside of the sandbox to mount, as far as the server supports them. */
  volumes?: readonly string[] | undefined;
  /** Ports of the sandbox to expose. */
  ports?: readonly string[] | undefined;
  /** Names of sandboxes that must run before this one. */
  dependsOn?: readonly string[] | undefined;
  /** The shell that runs the scripts. */
  shell?: string | undefined;
  /** Scripts that can be run in the sandbox, by name. */
  scripts?: Readonly<Record<string, string>> | undefined;
  /** The command to run when the sandbox starts. */
  exec?: string | undefined;

  /**
   * Seconds to wait until the sandbox is ready; the default is 180. After that, the server removes what it has created.
   */
  timeout?: number | undefined;
}

/** Options that say which server to call, with which key. */
export interface ServerOptions {
  /**
   * https://HOST[:PORT], or http:// on this machine. The default is MSB_SERVER_URL from the environment or from a
   * .env file in the working directory or above it, or http://127.0.0.1:5555.
   */
  serverUrl?: string | undefined;
  /** API key; the default is MSB_API_KEY from the environment or from a .env file in the working directory or above. */
  apiKey?: string | undefined;
  /** An Agent of node:http(s) that opens the connections, for proxies, client certificates and private authorities. */
  agent?: Agent | undefined;
}

/** Options of a sandbox and of its start. */
export interface SandboxOptions extends StartOptions, ServerOptions {
  /** Namespace of the sandbox; the default is the key's namespace, or default for a key that is not limited to one. */
  namespace?: string | undefined;
  /** 1 to 63 characters of A-Z a-z 0-9 - _; the default is a generated name. */
  name?: string | undefined;
}

/** Collects SandboxOptions with one call for each option. */
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

  disk(disk: number): this {
    return this.#set({ disk });
  }

  envs(envs: Envs): this {
    return this.#set({ envs });
  }

  workdir(workdir: string): this {
    return this.#set({ workdir });
  }

  user(user: string): this {
    return this.#set({ user });
  }

  hostname(hostname: string): this {
    return this.#set({ hostname });
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
  /** Returns a new builder: SandboxOptions.builder().name("my-sandbox").memory(1024).build(). */
  builder: (): SandboxOptionsBuilder => new SandboxOptionsBuilder(),
};
