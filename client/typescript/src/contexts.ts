import { checkOptionalStrings, checkOptions, checkString, unexpectedFormat } from "./check.js";
import { InvalidParamsError } from "./errors.js";
import type { CallOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** A session of an interpreter, which has its own variables. */
export interface Context {
  readonly name: string;
  /** python, node or bash. */
  readonly language: string;
  /** The directory in which the interpreter starts; undefined if it is the workdir of the sandbox. */
  readonly cwd: string | undefined;
  /** The interpreter; undefined if it does not run. */
  readonly pid: number | undefined;
  /** How many runs the interpreter had begun. */
  readonly count: number;
  /** Whether a run was in progress. */
  readonly busy: boolean;
}

/** Options of a new context. */
export interface ContextOptions extends CallOptions {
  /** python, node or bash; the default is the language of the sandbox. */
  language?: string | undefined;
  /** A new name of up to 64 letters, digits and . _ -; the default is a generated name. */
  name?: string | undefined;
  /** The directory in which the interpreter starts. */
  cwd?: string | undefined;
  /** A name or number in the sandbox, optionally with : and a group; the default is the user of the sandbox. */
  user?: string | undefined;
}

/** A context, as the server sends it. */
interface ContextData extends Partial<Context> {
  context?: string;
}

/** Seconds to wait for an interpreter to start. */
const interpreterLimit = 120;

/** The contexts of a sandbox. */
export class Contexts {
  readonly #sandbox: BaseSandbox;
  readonly #language: string | undefined;

  constructor(sandbox: BaseSandbox, language: string | undefined) {
    this.#sandbox = sandbox;
    this.#language = language;
  }

  /** Creates a context, and returns it when its interpreter is ready. */
  async create(options?: ContextOptions): Promise<Context> {
    const { language = this.#language, name, cwd, user, signal } = checkOptions(options);
    checkString("language", language);
    checkOptionalStrings({ name, cwd, user });
    const params = { language, context: name ?? undefined, cwd: cwd ?? undefined, user: user ?? undefined };
    return toContext(await this.#sandbox._call("sandbox.context.create", params, { limit: interpreterLimit, signal }));
  }

  /** Returns the contexts in the order in which they were created. */
  async list({ signal }: CallOptions = {}): Promise<Context[]> {
    const result = (await this.#sandbox._call("sandbox.context.list", {}, { idempotent: true, signal })) as {
      contexts?: unknown;
    } | null;
    if (!Array.isArray(result?.contexts)) throw unexpectedFormat("the list of contexts has");
    return result.contexts.map(toContext);
  }

  /** Replaces the interpreter of a context. Its variables are lost. A run in progress ends. */
  async restart(context: Context | string, { signal }: CallOptions = {}): Promise<Context> {
    const params = { context: contextName(context) };
    return toContext(await this.#sandbox._call("sandbox.context.restart", params, { limit: interpreterLimit, signal }));
  }

  /** Ends the interpreter of a context, and removes the context. A run in progress fails. */
  async remove(context: Context | string, { signal }: CallOptions = {}): Promise<void> {
    await this.#sandbox._call("sandbox.context.remove", { context: contextName(context) }, { signal });
  }
}

/** Returns the name of a context. */
export function contextName(context: Context | string): string {
  const name = typeof context === "object" && context !== null ? context.name : context;
  if (typeof name !== "string") {
    throw new InvalidParamsError(`context must be a context or its name, not ${String(context)}`);
  }
  return checkString("context", name);
}

function toContext(data: unknown): Context {
  const { context: name, language, cwd, pid, count = 0, busy = false } = (data ?? {}) as ContextData;
  if (typeof name !== "string" || typeof language !== "string") {
    throw unexpectedFormat("the description of the context has");
  }
  return { name, language, cwd, pid, count, busy };
}
