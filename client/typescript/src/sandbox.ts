/// <reference lib="esnext.disposable" preserve="true" />
import { randomUUID } from "node:crypto";
import { type InspectOptions, inspect } from "node:util";
import { Command } from "./command.js";
import { loadConfig } from "./config.js";
import { InvalidParamsError, NotStartedError, SandboxNotFoundError, UnexpectedAnswerError } from "./errors.js";
import type { Execution, OutputData } from "./execution.js";
import { Metrics, type SandboxMetrics } from "./metrics.js";
import type { CallOptions, RunOptions, SandboxOptions, StartOptions } from "./options.js";
import { Server } from "./server.js";

// Node.js before 20.5 lacks it, and then `await using` looks for it here.
if (!Symbol.asyncDispose) {
  Object.defineProperty(Symbol, "asyncDispose", { value: Symbol("Symbol.asyncDispose") });
}

// Seconds to wait for answers. The server's own limits are shorter.
const startLimit = 180;
const stopLimit = 120;
const metricsLimit = 30;
/** Seconds that a run may take beyond its time limit: its turn, and the way. */
const runGrace = 120;

/**
 * A sandbox on a server of msbd. Use PythonSandbox or NodeSandbox.
 *
 * All errors are a MicrosandboxError, but that of a signal is its reason, as everywhere.
 */
export abstract class BaseSandbox implements AsyncDisposable {
  readonly #server: Server;
  readonly #namespace: string | undefined;
  readonly #name: string;
  readonly #startOptions: StartOptions;
  #isStarted = false;

  /**
   * Names a sandbox. Nothing is sent: it need not be there yet.
   *
   * @throws ConfigError when the server's URL, the key or a .env file cannot be used
   */
  constructor(options?: SandboxOptions) {
    const { serverUrl, apiKey, agent, namespace, name, ...startOptions } = options ?? {};
    this.#server = new Server(loadConfig({ serverUrl, apiKey }), agent);
    this.#namespace = namespace || undefined;
    this.#name = name || `sandbox-${randomUUID().slice(0, 8)}`;
    this.#startOptions = startOptions;
  }

  /** Makes a sandbox and starts it; for the options and errors see the constructor and start(). */
  static create(options?: SandboxOptions): Promise<BaseSandbox> {
    // The subclass that this is called on.
    return BaseSandbox.createBase(this as unknown as new (options?: SandboxOptions) => BaseSandbox, options);
  }

  /** What create() of a subclass does. */
  protected static async createBase<T extends BaseSandbox>(
    ctor: new (options?: SandboxOptions) => T,
    options?: SandboxOptions,
  ): Promise<T> {
    const sandbox = new ctor(options);
    await sandbox.start(options);
    return sandbox;
  }

  /** The name of the image that the sandbox is started from unless another is named. */
  abstract getDefaultImage(): Promise<string>;

  /**
   * Runs code. What it defines is there for the next run; runs of one sandbox take turns.
   *
   * Code that raises is a result, whose status is error, and its traceback is in stderr.
   *
   * @throws RunTimeoutError after the timeout, NotStartedError, the errors of the connection, and the signal's
   *   reason
   */
  abstract run(code: string, options?: RunOptions): Promise<Execution>;

  /**
   * Starts the sandbox, and returns when it is ready. One that this object has started stays as it is. What
   * the options leave out is as the constructor was told.
   *
   * Starting a name that runs with an equal configuration succeeds at once.
   *
   * @throws ConflictError when it runs with another configuration, InvalidParamsError when an option is wrong or
   *   not supported by the server, RequestTimeoutError after the timeout, the other errors of the server and
   *   the connection, and the signal's reason
   */
  start(options?: StartOptions): Promise<void>;
  start(image?: string, memory?: number, cpus?: number, timeout?: number): Promise<void>;
  async start(first?: StartOptions | string, memory?: number, cpus?: number, timeout?: number): Promise<void> {
    if (this.#isStarted) return;
    const given = typeof first === "object" && first ? first : { image: first, memory, cpus, timeout };
    const options: StartOptions = { ...this.#startOptions, ...defined(given) };
    const { envs, workdir, volumes, ports, dependsOn, shell, scripts, exec } = options;
    await this.#server.call({
      method: "sandbox.start",
      params: {
        ...this.#which(),
        config: {
          image: options.image || (await this.getDefaultImage()),
          memory: options.memory,
          cpus: options.cpus === undefined ? undefined : Math.round(options.cpus),
          envs: envs && (isList(envs) ? envs : Object.entries(envs).map(([name, value]) => `${name}=${value}`)),
          workdir,
          // What the server does not support, it refuses by name; left out here, nobody would say so.
          volumes,
          ports,
          depends_on: dependsOn,
          shell,
          scripts,
          exec,
        },
      },
      limit: seconds(options.timeout ?? startLimit),
      repeatable: true,
      signal: options.signal,
    });
    this.#isStarted = true;
  }

  /**
   * Stops the sandbox, if this object started it: all that was written in it is gone, and its name is free.
   *
   * @throws SandboxNotFoundError when it is gone already, the other errors of the server and the connection,
   *   and the signal's reason
   */
  async stop(options: CallOptions = {}): Promise<void> {
    if (!this.#isStarted) return;
    try {
      // Not repeatable: a second one would not find it.
      await this.#server.call({
        method: "sandbox.stop",
        params: this.#which(),
        limit: stopLimit,
        signal: options.signal,
      });
    } catch (error) {
      if (error instanceof SandboxNotFoundError) this.#isStarted = false;
      throw error;
    }
    this.#isStarted = false;
  }

  /** Stops the sandbox at the end of the block of `await using`. That it is gone already is no error. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.stop();
    } catch (error) {
      if (!(error instanceof SandboxNotFoundError)) throw error;
    }
  }

  /** Runs programs in the sandbox. */
  get command(): Command {
    return new Command(this);
  }

  /** Says what the sandbox uses. */
  get metrics(): Metrics {
    return new Metrics(this);
  }

  /** Whether this object has started the sandbox, and not stopped it. */
  get isStarted(): boolean {
    return this.#isStarted;
  }

  /** The server on which the sandbox runs. */
  get serverUrl(): string {
    return this.#server.config.serverUrl;
  }

  /** The namespace that was given; undefined is the key's own, or default for a key that is not limited to one. */
  get namespace(): string | undefined {
    return this.#namespace;
  }

  /** The sandbox's name; made up if none was given. */
  get name(): string {
    return this.#name;
  }

  /** The API key; undefined if there is none. Nothing but this tells it. */
  get apiKey(): string | undefined {
    return this.#server.config.key?.reveal();
  }

  /** What is fit to be logged. */
  toJSON(): { name: string; namespace: string | undefined; serverUrl: string; isStarted: boolean } {
    return { name: this.name, namespace: this.namespace, serverUrl: this.serverUrl, isStarted: this.isStarted };
  }

  /** @internal */
  [inspect.custom](_depth: number, options: InspectOptions): string {
    return `${this.constructor.name} ${inspect(this.toJSON(), options)}`;
  }

  /** @internal Makes a run and returns its result. Without a time limit, it lasts as long as the server allows. */
  async _run(method: string, params: Record<string, unknown>, options?: RunOptions): Promise<OutputData> {
    this.#requireStart();
    const timeout = seconds(options?.timeout);
    const result = (await this.#server.call({
      method,
      params: { ...this.#which(), ...params, timeout },
      limit: timeout && timeout + runGrace,
      signal: options?.signal,
    })) as OutputData | null;
    if (!Array.isArray(result?.output)) throw unknownForm("the result of a run");
    return result;
  }

  /** @internal */
  async _metrics({ signal }: CallOptions): Promise<SandboxMetrics> {
    this.#requireStart();
    const result = (await this.#server.call({
      method: "sandbox.metrics.get",
      params: this.#which(),
      limit: metricsLimit,
      repeatable: true,
      signal,
    })) as { sandboxes?: SandboxMetrics[] } | null;
    if (!Array.isArray(result?.sandboxes)) throw unknownForm("the answer about metrics");
    const [metrics] = result.sandboxes;
    if (!metrics) throw new SandboxNotFoundError(`sandbox ${this.#name} does not exist`);
    return metrics;
  }

  #which(): { sandbox: string; namespace: string | undefined } {
    return { sandbox: this.#name, namespace: this.#namespace };
  }

  #requireStart(): void {
    if (!this.#isStarted) throw new NotStartedError("Sandbox is not started. Call start() first.");
  }
}

/** Checks a time limit, in seconds. None is undefined: JSON has no Infinity. */
function seconds(timeout: number | undefined): number | undefined {
  if (timeout == null || timeout === Infinity) return undefined;
  if (typeof timeout !== "number" || !(timeout >= 0)) {
    throw new InvalidParamsError(`timeout ${timeout}: give a number of seconds, or leave it out`);
  }
  return timeout;
}

/** The members that are there. */
function defined<T extends object>(options: T): Partial<T> {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value != null)) as Partial<T>;
}

/** Array.isArray, for lists that are read-only, too. */
function isList(value: object): value is readonly string[] {
  return Array.isArray(value);
}

function unknownForm(what: string): UnexpectedAnswerError {
  return new UnexpectedAnswerError(`${what} is not in the form that this package knows: is the server newer than it?`);
}
