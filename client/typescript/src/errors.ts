import type { CommandExecution, Execution, ExceptionData } from "./execution.js";
import type { ProcessExecution } from "./process.js";

/** The properties of an error besides its message. Unknown ones are absent. */
export interface ErrorDetails {
  /** The JSON-RPC error code of the server. */
  code?: number;
  /** The HTTP status of the response. */
  status?: number;
  /** Identifies the request in the server's log. */
  requestId?: string;
  /** Seconds that the server asks to wait. */
  retryAfter?: number;
  /** The error of the platform that caused this one. */
  cause?: unknown;
  /** The details of the server's error. */
  data?: Readonly<Record<string, unknown>>;
  /** What a run had done before the error. */
  execution?: AnyExecution;
}

/** What a run, a command or a process did. */
export type AnyExecution = Execution | CommandExecution | ProcessExecution;

/**
 * The base of all errors of this package. No error holds the API key.
 *
 * The message says what happened and what to do. It is for people and may change.
 */
export class MicrosandboxError extends Error {
  /** The JSON-RPC error code; absent if the server sent none. */
  declare readonly code?: number;
  /** The HTTP status; absent if there was no response. */
  declare readonly status?: number;
  /** Identifies the request in the server's log; absent if there was no response. */
  declare readonly requestId?: string;
  /** Seconds that the server asks to wait; absent if it did not say. */
  declare readonly retryAfter?: number;
  /** The details of the server's error, such as timed_out; absent if there are none. It is not enumerable. */
  declare readonly data?: Readonly<Record<string, unknown>>;
  /**
   * What the run, the command or the process had printed and shown before the error; absent if that is not known. It
   * is not enumerable, so that logs of errors do not contain the output.
   */
  declare readonly execution?: AnyExecution;

  constructor(message: string, { cause, data, execution, ...details }: ErrorDetails = {}) {
    super(message, cause === undefined ? undefined : { cause });
    Object.assign(this, details);
    for (const [name, value] of Object.entries({ data, execution })) {
      if (value !== undefined) Object.defineProperty(this, name, { value, configurable: true, writable: true });
    }
  }
}

// The server's errors, one class for each error code.

/** -32700: the request is not strict JSON, for example because the code contains half a surrogate pair. */
export class ParseError extends MicrosandboxError {}

/** -32600: the request is invalid, for example longer than 1 MiB, or the path of the URL is wrong. */
export class InvalidRequestError extends MicrosandboxError {}

/** -32601: the server does not have the method, because it is older than this package. */
export class MethodNotFoundError extends MicrosandboxError {}

/** -32602: a parameter is wrong, out of range or not supported; the message names it. */
export class InvalidParamsError extends MicrosandboxError {}

/** -32002: the key is missing, malformed, expired, revoked or unknown. */
export class AuthenticationError extends MicrosandboxError {}

/** -32003: the sandbox does not exist, or it has no such process, file or context. */
export class SandboxNotFoundError extends MicrosandboxError {}

/** -32004: the key is valid, but limited to other namespaces or other methods. */
export class PermissionDeniedError extends MicrosandboxError {}

/**
 * -32005: the sandbox runs with another configuration, or is in the wrong state. Also: a process has ended, or a file
 * has the wrong type.
 */
export class ConflictError extends MicrosandboxError {}

/** -32006: a quota or a rate limit was exceeded, and retryAfter says when to retry; or a run printed too much. */
export class ResourceExhaustedError extends MicrosandboxError {}

/** -32007: the run reached its time limit and was interrupted. The session continues. */
export class RunTimeoutError extends MicrosandboxError {}

/** -32008: the sandbox has no such program. */
export class CommandNotFoundError extends MicrosandboxError {}

/** -32010: the run had begun, and failed in the sandbox or was lost. It may have taken effect. */
export class RunFailedError extends MicrosandboxError {}

/** -32011: the file exists in the sandbox but cannot be run. */
export class CommandNotExecutableError extends CommandNotFoundError {}

/** -32009: the server is starting or stopping, or the sandbox does not respond. */
export class UnavailableError extends MicrosandboxError {}

/** -32603: an unexpected error; the server's log contains the cause under the request id. */
export class InternalError extends MicrosandboxError {}

// Errors that this package detects itself.

/** The server's URL, the API key or a .env file cannot be used. */
export class ConfigError extends MicrosandboxError {}

/** The sandbox was not started, or was stopped. */
export class NotStartedError extends MicrosandboxError {}

/** The connection to the server failed. Nothing was sent. */
export class ServerUnreachableError extends MicrosandboxError {}

/** The connection ended before the response. The call may have taken effect. */
export class ConnectionLostError extends MicrosandboxError {}

/** No response arrived in time. The server interrupts the call. */
export class RequestTimeoutError extends MicrosandboxError {}

/** The response is not from msbd, but possibly from a proxy in front of it. */
export class UnexpectedAnswerError extends MicrosandboxError {}

// Errors of raiseForStatus().

/** The code threw an exception, or ended with an exit code other than 0. */
export class CodeError extends MicrosandboxError {
  declare readonly execution: Execution;
  /** The exception; undefined if the code ended without one, as in Bash. */
  readonly exception: ExceptionData | undefined;

  constructor(message: string, execution: Execution) {
    super(message, { execution });
    this.exception = execution.exception;
  }
}

/** The exit code of a command or of a process is not 0. */
export class CommandExitError extends MicrosandboxError {
  declare readonly execution: CommandExecution | ProcessExecution;
  readonly exitCode: number;

  constructor(message: string, execution: CommandExecution | ProcessExecution) {
    super(message, { execution });
    this.exitCode = execution.exitCode;
  }

  /** The standard output, without trailing white space. */
  get stdout(): string {
    return this.execution.stdout;
  }

  /** The standard error, without trailing white space. */
  get stderr(): string {
    return this.execution.stderr;
  }
}

/** The class of each error code of the server. */
export const errorsByCode: ReadonlyMap<number, typeof MicrosandboxError> = new Map([
  [-32700, ParseError],
  [-32600, InvalidRequestError],
  [-32601, MethodNotFoundError],
  [-32602, InvalidParamsError],
  [-32002, AuthenticationError],
  [-32003, SandboxNotFoundError],
  [-32004, PermissionDeniedError],
  [-32005, ConflictError],
  [-32006, ResourceExhaustedError],
  [-32007, RunTimeoutError],
  [-32008, CommandNotFoundError],
  [-32009, UnavailableError],
  [-32010, RunFailedError],
  [-32011, CommandNotExecutableError],
  [-32603, InternalError],
]);

// Set the names explicitly, because bundlers may rename the classes.
const names = {
  MicrosandboxError,
  ParseError,
  InvalidRequestError,
  MethodNotFoundError,
  InvalidParamsError,
  AuthenticationError,
  SandboxNotFoundError,
  PermissionDeniedError,
  ConflictError,
  ResourceExhaustedError,
  RunTimeoutError,
  CommandNotFoundError,
  RunFailedError,
  CommandNotExecutableError,
  UnavailableError,
  InternalError,
  ConfigError,
  NotStartedError,
  ServerUnreachableError,
  ConnectionLostError,
  RequestTimeoutError,
  UnexpectedAnswerError,
  CodeError,
  CommandExitError,
};
for (const [name, kind] of Object.entries(names)) {
  Object.defineProperty(kind.prototype, "name", { value: name, configurable: true, writable: true });
}
