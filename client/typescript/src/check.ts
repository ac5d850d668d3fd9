import { InvalidParamsError, UnexpectedAnswerError } from "./errors.js";
import type { Envs, ProgramOptions } from "./options.js";

/** Returns the options, or {} if there are none. Anything but an object is refused, because it would be ignored. */
export function checkOptions<T extends object>(options: T | null | undefined): Partial<T> {
  if (options != null && typeof options !== "object") {
    throw new InvalidParamsError(`the options must be an object, such as { name: "my-sandbox" }, not ${show(options)}`);
  }
  return options ?? {};
}

/** Refuses empty strings, so that an option with no content is not taken for one that was left out. */
export function checkNotEmpty(options: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(options)) {
    if (value === "") throw new InvalidParamsError(`${name} is empty: give a ${name}, or leave it out`);
  }
}

/** Returns environment variables as NAME=value strings. */
export function assignments(envs: Envs): readonly string[] {
  if (isList(envs)) {
    return checkStrings("envs", envs, "NAME=value");
  }
  if (typeof envs !== "object") {
    throw new InvalidParamsError(`envs must be an object or a list of strings, not ${show(envs)}`);
  }
  return Object.entries(envs).map(([name, value]) => {
    if (value == null) throw new InvalidParamsError(`envs: ${name} has no value: give a string, or leave it out`);
    if (typeof value !== "string") {
      throw new InvalidParamsError(`envs: the value of ${name} must be a string, not ${show(value)}`);
    }
    return `${name}=${value}`;
  });
}

/** Like Array.isArray, but also narrows the type of read-only arrays. */
function isList(value: object): value is readonly string[] {
  return Array.isArray(value);
}

/** Refuses anything but a list of strings. example is one such string. */
export function checkStrings(name: string, value: unknown, example: string): readonly string[] {
  if (!Array.isArray(value) || !value.every((element) => typeof element === "string")) {
    const not = Array.isArray(value) ? "a list with other values" : show(value);
    throw new InvalidParamsError(`${name} must be a list of strings, such as ["${example}"], not ${not}`);
  }
  return value;
}

/** Refuses anything but a string that is not empty. */
export function checkString(name: string, value: unknown): string {
  if (typeof value !== "string") throw new InvalidParamsError(`${name} must be a string, not ${show(value)}`);
  checkNotEmpty({ [name]: value });
  return value;
}

/** Refuses options that are given and are not strings, or are empty. */
export function checkOptionalStrings(options: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(options)) {
    if (value != null) checkString(name, value);
  }
}

/** Refuses options that are given and are not functions. */
export function checkCallbacks(options: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(options)) {
    if (value != null && typeof value !== "function") {
      throw new InvalidParamsError(`${name} must be a function, not ${show(value)}`);
    }
  }
}

/** Refuses anything but an integer from min to max. */
export function checkInteger(name: string, value: unknown, min: number, max: number): number {
  if (typeof value !== "number" || !Number.isInteger(value) || value < min || value > max) {
    throw new InvalidParamsError(`${name} must be an integer from ${min} to ${max}, not ${show(value)}`);
  }
  return value;
}

/** Checks the options of everything that runs in a sandbox, and returns them as members of params. */
export function programParams({ cwd, envs, user }: ProgramOptions): Record<string, unknown> {
  checkOptionalStrings({ cwd, user });
  return { cwd: cwd ?? undefined, envs: envs == null ? undefined : assignments(envs), user: user ?? undefined };
}

/** Checks a time limit in seconds. Infinity becomes undefined, because JSON has no infinity. */
export function seconds(timeout: number | null | undefined): number | undefined {
  if (timeout == null || timeout === Infinity) return undefined;
  if (typeof timeout !== "number" || !(timeout >= 0)) {
    throw new InvalidParamsError(`timeout ${timeout}: give a number of seconds, or leave it out`);
  }
  return timeout;
}

/** Refuses anything but text or bytes. */
export function checkInput(name: string, input: unknown): string | Uint8Array {
  if (typeof input === "string" || input instanceof Uint8Array) return input;
  throw new InvalidParamsError(`${name} must be a string or a Uint8Array, not ${show(input)}`);
}

/**
 * Returns input for a program, if there is any, as the member name of params. Bytes are sent as base64, so that they
 * arrive unaltered.
 */
export function encoded(name: string, input: unknown): Record<string, string> {
  if (input == null) return {};
  const data = checkInput(name, input);
  if (typeof data === "string") return { [name]: data };
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  return { [name]: bytes.toString("base64"), encoding: "base64" };
}

function show(value: unknown): string {
  return typeof value === "string" ? `the string ${JSON.stringify(value)}` : String(value);
}

/** subject is the subject and the verb of the message. */
export function unexpectedFormat(subject: string): UnexpectedAnswerError {
  return new UnexpectedAnswerError(`${subject} an unexpected format; the server may be newer than this package`);
}
