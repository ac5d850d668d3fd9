import { InvalidParamsError, UnexpectedAnswerError } from "./errors.js";

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
export function assignments(envs: Readonly<Record<string, string>> | readonly string[]): readonly string[] {
  if (isList(envs)) return envs;
  if (typeof envs !== "object") {
    throw new InvalidParamsError(`envs must be an object or a list of strings, not ${show(envs)}`);
  }
  return Object.entries(envs).map(([name, value]) => {
    if (value == null) throw new InvalidParamsError(`envs: ${name} has no value: give a string, or leave it out`);
    return `${name}=${value}`;
  });
}

/** Like Array.isArray, but also narrows the type of read-only arrays. */
function isList(value: object): value is readonly string[] {
  return Array.isArray(value);
}

function show(value: unknown): string {
  return typeof value === "string" ? `the string ${JSON.stringify(value)}` : String(value);
}

/** subject is the subject and the verb of the message. */
export function unexpectedFormat(subject: string): UnexpectedAnswerError {
  return new UnexpectedAnswerError(`${subject} an unexpected format; the server may be newer than this package`);
}
