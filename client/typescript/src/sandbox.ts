/// <reference lib="esnext.disposable" preserve="true" />
import "./dispose.js";
import { randomUUID } from "node:crypto";
import { type InspectOptions, inspect } from "node:util";
import {
  assignments,
  checkCallbacks,
  checkNotEmpty,
  checkOptionalStrings,
  checkOptions,
  checkString,
  encoded,
  programParams,
  seconds,
  unexpectedFormat,
} from "./check.js";
import { Command } from "./command.js";
import { loadConfig } from "./config.js";
import { Contexts, contextName } from "./contexts.js";
import { type AnyExecution, MicrosandboxError, NotStartedError, SandboxNotFoundError } from "./errors.js";
import { type ExceptionData, Execution, type OutputData } from "./execution.js";
import { Files } from "./files.js";
import { Forward, type ForwardOptions } from "./forward.js";
import { queryLimit, type SandboxInfo } from "./list.js";
import { Metrics, type SandboxMetrics } from "./metrics.js";
import type { CallOptions, CodeOptions, CommandOptions, RunOptions, SandboxOptions, StartOptions } from "./options.js";
import { OutputCollector } from "./output.js";
import { Processes } from "./process.js";
import { Pty } from "./pty.js";
import { Result, type ResultData } from "./result.js";
import { type Call, Server, type ServerEvent, type Transfer } from "./server.js";

// Seconds to wait for a response. The server's own limits are shorter.
const startLimit = 180;
const stopLimit = 120;
/** Seconds that a run may take beyond its time limit: waiting while other runs finish, and the network. */
const runGrace = 120;

/** Options of a call of a method of a sandbox. */
type SandboxCall = Omit<Call, "method" | "params">;

/**
 * A sandbox on an msbd server. Use PythonSandbox or NodeSandbox.
 *
 * All errors are subclasses of MicrosandboxError, except that an aborted call throws the signal's reason.
 */
export abstract class BaseSandbox implements AsyncDisposable {
  readonly #server: Server;
  readonly #namespace: string | undefined;
  readonly #name: string;
  readonly #startOptions: StartOptions;
  #isStarted = false;

  /**
   * Creates an object for a sandbox, which need not exist yet. Nothing is sent.
   *
   * @throws ConfigError if the server's URL, the key or a .env file cannot be used
   */
  constructor(options?: SandboxOptions) {
    const { serverUrl, apiKey, agent, namespace, name, ...startOptions } = checkOptions(options);
    checkNotEmpty({ namespace, name });
    this.#server = new Server(loadConfig({ serverUrl, apiKey }), agent);
    this.#namespace = namespace ?? undefined;
    this.#name = name ?? `sandbox-${randomUUID().slice(0, 8)}`;
    this.#startOptions = startOptions;
  }

  /** Creates a sandbox and starts it. For the options and errors, see the constructor and start(). */
  static create(options?: SandboxOptions): Promise<BaseSandbox> {
    // this is the subclass on which create is called.
    return BaseSandbox.createBase(this as unknown as new (options?: SandboxOptions) => BaseSandbox, options);
  }

  /** Implements create() of the subclasses. */
  protected static async createBase<T extends BaseSandbox>(
    ctor: new (options?: SandboxOptions) => T,
    options?: SandboxOptions,
  ): Promise<T> {
    const sandbox = new ctor(options);
    await sandbox.start(options);
    return sandbox;
  }

  /** Returns the name of the image that start() uses if none is given. */
  abstract getDefaultImage(): Promise<string>;

  /**
   * Runs code. Variables and definitions are kept for the next run. Runs in one context are executed one by one.
   *
   * If the code throws an exception, the status of the result is error, and the traceback is in stderr. Use
   * raiseForStatus() to throw it as a CodeError.
   *
   * @throws RunTimeoutError after the timeout, NotStartedError, the errors of the connection, and the signal's
   *   reason. The error's execution has what the code had printed and shown before.
   */
  abstract run(code: string, options?: CodeOptions): Promise<Execution>;

  /**
   * Starts the sandbox, and returns when it is ready. If this object has already started it, it does nothing.
   * Options that are not given are taken from the constructor.
   *
   * If a sandbox with this name is running with the same configuration, start succeeds immediately.
   *
   * @throws ConflictError if it runs with another configuration, InvalidParamsError if an option is wrong or
   *   not supported by the server, RequestTimeoutError after the timeout, the other errors of the server and
   *   the connection, and the signal's reason
   */
  start(options?: StartOptions): Promise<void>;
  start(image?: string, memory?: number, cpus?: number, timeout?: number): Promise<void>;
  async start(first?: StartOptions | string, memory?: number, cpus?: number, timeout?: number): Promise<void> {
    if (this.#isStarted) return;
    const given = typeof first === "object" && first ? first : { image: first, memory, cpus, timeout };
    const options: StartOptions = { ...this.#startOptions, ...defined(given) };
    const { image, envs, workdir, user, hostname, volumes, ports, dependsOn, shell, scripts, exec } = options;
    checkNotEmpty({ image });
    await this.#server.call({
      method: "sandbox.start",
      params: {
        ...this.#sandboxParams(),
        config: {
          image: image ?? (await this.getDefaultImage()),
          memory: options.memory,
          cpus: options.cpus === undefined ? undefined : Math.round(options.cpus),
          disk: options.disk,
          envs: envs && assignments(envs),
          workdir,
          user,
          hostname,
          // Send these although the server does not support all of them, so that it refuses them by name instead of
          // ignoring them silently.
          volumes,
          ports,
          depends_on: dependsOn,
          shell,
          scripts,
          exec,
        },
      },
      limit: seconds(options.timeout ?? startLimit),
      idempotent: true,
      signal: options.signal,
    });
    this.#isStarted = true;
  }

  /**
   * Stops the sandbox, if this object started it. Its data is deleted, and its name can be used again.
   *
   * @throws SandboxNotFoundError if the sandbox does not exist, the other errors of the server and the connection,
   *   and the signal's reason
   */
  async stop(options: CallOptions = {}): Promise<void> {
    if (!this.#isStarted) return;
    try {
      // Not idempotent, because a second stop would not find the sandbox.
      await this.#server.call({
        method: "sandbox.stop",
        params: this.#sandboxParams(),
        limit: stopLimit,
        signal: options.signal,
      });
    } catch (error) {
      if (error instanceof SandboxNotFoundError) this.#isStarted = false;
      throw error;
    }
    this.#isStarted = false;
  }

  /** Stops the sandbox at the end of an `await using` block. It is not an error if the sandbox does not exist. */
  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.stop();
    } catch (error) {
      if (!(error instanceof SandboxNotFoundError)) throw error;
    }
  }

  /**
   * Returns the sandbox's state and configuration. This object need not have started the sandbox.
   *
   * @throws SandboxNotFoundError if the sandbox does not exist, the errors of the connection, and the signal's reason
   */
  async info({ signal }: CallOptions = {}): Promise<SandboxInfo> {
    const info = (await this.#server.call({
      method: "sandbox.get",
      params: this.#sandboxParams(),
      limit: queryLimit,
      idempotent: true,
      signal,
    })) as SandboxInfo | null;
    if (typeof info?.state !== "string") throw unexpectedFormat("the description of the sandbox has");
    return info;
  }

  /** Runs programs in the sandbox. */
  get command(): Command {
    return new Command(this);
  }

  /** Starts programs that go on in the background, and connects to them. */
  get process(): Processes {
    return new Processes(this);
  }

  /** Starts programs on a terminal. */
  get pty(): Pty {
    return new Pty(this);
  }

  /** Reads and writes files of the sandbox. */
  get files(): Files {
    return new Files(this);
  }

  /** The sessions of interpreters in which code runs. */
  get contexts(): Contexts {
    return new Contexts(this, this._language);
  }

  /**
   * Forwards a port of this machine to a TCP port of the sandbox, on which a program listens at 127.0.0.1. It continues
   * until it is closed.
   */
  forward(port: number, options?: ForwardOptions): Promise<Forward> {
    return Forward.listen(this, port, options);
  }

  /** Returns the resource usage of the sandbox. */
  get metrics(): Metrics {
    return new Metrics(this);
  }

  /** Whether this object has started the sandbox and not stopped it. */
  get isStarted(): boolean {
    return this.#isStarted;
  }

  /** The URL of the server on which the sandbox runs. */
  get serverUrl(): string {
    return this.#server.config.serverUrl;
  }

  /** The given namespace. Undefined means the key's namespace, or default for a key that is not limited to one. */
  get namespace(): string | undefined {
    return this.#namespace;
  }

  /** The sandbox's name; generated if none was given. */
  get name(): string {
    return this.#name;
  }

  /** The API key; undefined if there is none. Nothing else in this package shows the key. */
  get apiKey(): string | undefined {
    return this.#server.config.key?.reveal();
  }

  /** Returns the attributes that may be logged. */
  toJSON(): { name: string; namespace: string | undefined; serverUrl: string; isStarted: boolean } {
    return { name: this.name, namespace: this.namespace, serverUrl: this.serverUrl, isStarted: this.isStarted };
  }

  /** @internal The language of the sandbox; undefined in a subclass of BaseSandbox that has none. */
  get _language(): string | undefined {
    return undefined;
  }

  /** @internal */
  [inspect.custom](_depth: number, options: InspectOptions): string {
    return `${this.constructor.name} ${inspect(this.toJSON(), options)}`;
  }

  /** @internal Runs code. language is the language of the sandbox. */
  async _runCode(language: string, code: string, options?: CodeOptions): Promise<Execution> {
    checkString("code", code);
    const { context, language: given } = checkOptions(options);
    checkOptionalStrings({ language: given });
    const params = {
      code,
      results: true,
      // The server knows the language of a context.
      language: given ?? (context == null ? language : undefined),
      context: context == null ? undefined : contextName(context),
    };
    const toExecution = (data: OutputData, streamed?: OutputCollector) => new Execution(data, streamed?.lines);
    return this._run("sandbox.repl.run", params, options, toExecution);
  }

  /**
   * @internal Makes a run, as a stream if there are callbacks. Without a timeout, it may take as long as the server
   * allows. toExecution is called with the server's result, and with the output if it was streamed.
   */
  async _run<T extends AnyExecution>(
    method: string,
    params: Record<string, unknown>,
    given: (RunOptions & Pick<CodeOptions, "onResult"> & Pick<CommandOptions, "binary">) | undefined,
    toExecution: (data: OutputData, streamed?: OutputCollector) => T,
  ): Promise<T> {
    const options = checkOptions(given);
    const { signal, stdin, onStdout, onStderr, onResult, binary } = options;
    checkCallbacks({ onStdout, onStderr, onResult });
    const timeout = seconds(options.timeout);
    const input = encoded("stdin", binary && typeof stdin === "string" ? Buffer.from(stdin) : stdin);
    // The encoding is that of the input and of the output.
    if (binary) input.encoding = "base64";
    const call: Call = {
      method,
      params: { ...this.#sandboxParams(), ...params, ...programParams(options), timeout, ...input },
      limit: timeout && timeout + runGrace,
      signal,
    };
    this.#requireStart();
    /** What is known of a run that failed. */
    const failed: OutputData = { ...(params as { command?: string; args?: string[] }), results: [], status: "error" };
    if (!onStdout && !onStderr && !onResult) {
      const result = (await this.#server.call(call).catch((error: unknown) => {
        const data = (error as MicrosandboxError).data;
        if (Array.isArray(data?.output)) addExecution(error, toExecution({ ...failed, ...data }));
        throw error;
      })) as OutputData | null;
      if (!Array.isArray(result?.output)) throw unexpectedFormat("the result of the run has");
      return toExecution(result);
    }
    const streamed = new OutputCollector();
    const results: ResultData[] = [];
    let exception: ExceptionData | undefined;
    let isStarted = false;
    try {
      for await (const { name, data } of this.#server.events(call)) {
        isStarted = true;
        if (name === "output") {
          const { stream, text } = streamed.add(data);
          await (stream === "stdout" ? onStdout : onStderr)?.(text);
        } else if (name === "display") {
          const result = new Result(data);
          results.push(data);
          streamed.addLines("stdout", result.text ?? "");
          await onResult?.(result);
        } else if (name === "exception") {
          exception = data as unknown as ExceptionData;
          streamed.addLines("stderr", exception.traceback);
        } else if (name === "result") {
          return toExecution(withException({ ...data, results }, exception), streamed);
        }
      }
    } catch (error) {
      if (isStarted || (error as MicrosandboxError).data?.output) {
        addExecution(error, toExecution(withException({ ...failed, results }, exception), streamed));
      }
      throw error;
    }
    throw unexpectedFormat("the stream of the run has");
  }

  /** @internal Calls a method of the sandbox. */
  async _call(method: string, params: Record<string, unknown>, options: SandboxCall = {}): Promise<unknown> {
    this.#requireStart();
    const { limit = queryLimit, ...rest } = options;
    return this.#server.call({ method, params: { ...this.#sandboxParams(), ...params }, limit, ...rest });
  }

  /** @internal Calls a method of the sandbox that responds with events. */
  _events(method: string, params: Record<string, unknown>, options: SandboxCall = {}): AsyncGenerator<ServerEvent> {
    this.#requireStart();
    return this.#server.events({ method, params: { ...this.#sandboxParams(), ...params }, ...options });
  }

  /** @internal Downloads a file of the sandbox, or a tree as an archive. */
  _get(path: string, options: Pick<Transfer, "headers" | "signal"> = {}): AsyncGenerator<Buffer> {
    this.#requireStart();
    return this.#server.get({ method: "GET", path: this.#path("files", { path }), idempotent: true, ...options });
  }

  /** @internal Uploads a file, or a tree as an archive. params are members of the query. */
  async _put(params: Record<string, string | undefined>, options: Omit<Transfer, "method" | "path">): Promise<unknown> {
    this.#requireStart();
    return this.#server.put({ method: "PUT", path: this.#path("files", params), ...options });
  }

  /** @internal Returns the server, and the path of a WebSocket to a port of the sandbox. */
  _port(port: number): { server: Server; path: string } {
    this.#requireStart();
    return { server: this.#server, path: this.#path(`ports/${port}`, {}) };
  }

  /** @internal */
  async _metrics({ signal }: CallOptions): Promise<SandboxMetrics> {
    const result = (await this._call("sandbox.metrics.get", {}, { idempotent: true, signal })) as {
      sandboxes?: SandboxMetrics[];
    } | null;
    if (!Array.isArray(result?.sandboxes)) throw unexpectedFormat("the metrics have");
    const [metrics] = result.sandboxes;
    if (!metrics) throw new SandboxNotFoundError(`sandbox ${this.#name} does not exist`);
    return metrics;
  }

  /** Returns a path of the sandbox below /api/v1, with a query. */
  #path(path: string, params: Record<string, string | undefined>): string {
    const query = Object.entries({ ...params, namespace: this.#namespace })
      .filter(([, value]) => value !== undefined)
      .map(([name, value]) => `${name}=${encodeURIComponent(value as string)}`);
    const base = `/sandboxes/${encodeURIComponent(this.#name)}/${path}`;
    return query.length > 0 ? `${base}?${query.join("&")}` : base;
  }

  #sandboxParams(): { sandbox: string; namespace: string | undefined } {
    return { sandbox: this.#name, namespace: this.#namespace };
  }

  #requireStart(): void {
    if (!this.#isStarted) throw new NotStartedError("Sandbox is not started. Call start() first.");
  }
}

/** Sets the execution of an error of this package. */
function addExecution(error: unknown, execution: AnyExecution): void {
  if (error instanceof MicrosandboxError) {
    Object.defineProperty(error, "execution", { value: execution, configurable: true, writable: true });
  }
}

function withException(data: OutputData, exception: ExceptionData | undefined): OutputData {
  return exception ? { ...data, error: exception } : data;
}

/** Returns the members that are neither undefined nor null. */
function defined<T extends object>(options: T): Partial<T> {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value != null)) as Partial<T>;
}
