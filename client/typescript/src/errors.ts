/** What an error tells beside its message. Members that are not known are absent. */
export interface ErrorDetails {
  /** The JSON-RPC error code of the server. */
  code?: number;
  /** The HTTP status of the answer. */
  status?: number;
  /** Finds the request in the server's log. */
  requestId?: string;
  /** Seconds that the server asks to wait. */
  retryAfter?: number;
  /** The platform's error that this one comes from. */
  cause?: unknown;
}

/**
 * The base of all errors of this package. No error holds the API key.
 *
 * The message says what happened and what to do about it; it is for people and may change.
 */
export class MicrosandboxError extends Error {
  /** The JSON-RPC error code; absent if the server told none. */
  declare readonly code?: number;
  /** The HTTP status; absent if there was no answer. */
  declare readonly status?: number;
  /** Finds the request in the server's log; absent if there was no answer. */
  declare readonly requestId?: string;
  /** Seconds that the server asks to wait; absent if it did not say. */
  declare readonly retryAfter?: number;

  constructor(message: string, { cause, ...details }: ErrorDetails = {}) {
    super(message, cause === undefined ? undefined : { cause });
    Object.assign(this, details);
  }
}

// What the server tells, one for each of its error codes.

/** -32700: the request is not strict JSON, as with half a surrogate pair in the code. */
export class ParseError extends MicrosandboxError {}

/** -32600: not a request, as when it is longer than 1 MiB, or the URL's path is not the server's. */
export class InvalidRequestError extends MicrosandboxError {}

/** -32601: the server has no such method: it is older than this package. */
export class MethodNotFoundError extends MicrosandboxError {}

/** -32602: a parameter is wrong, out of range or not supported; the message names it. */
export class InvalidParamsError extends MicrosandboxError {}

/** -32002: there is no key, or it is malformed, expired, revoked or unknown. */
export class AuthenticationError extends MicrosandboxError {}

/** -32003: there is no such sandbox. */
export class SandboxNotFoundError extends MicrosandboxError {}

/** -32004: the key is good, but limited to another namespace or to other methods. */
export class PermissionDeniedError extends MicrosandboxError {}

/** -32005: the sandbox runs with another configuration, or is in the wrong state. */
export class ConflictError extends MicrosandboxError {}

/** -32006: over a quota or a rate limit, and retryAfter says when to come back; or a run printed too much. */
export class ResourceExhaustedError extends MicrosandboxError {}

/** -32007: the run reached its time limit and was interrupted. The session goes on. */
export class RunTimeoutError extends MicrosandboxError {}

/** -32008: the sandbox has no such program. */
export class CommandNotFoundError extends MicrosandboxError {}

/** -32009: the server starts or stops, or the sandbox does not answer. */
export class UnavailableError extends MicrosandboxError {}

/** -32603: unforeseen; the server's log has the cause under the request id. */
export class InternalError extends MicrosandboxError {}

// What this side finds by itself.

/** The server's URL, the API key or a .env file cannot be used as it is. */
export class ConfigError extends MicrosandboxError {}

/** The sandbox was not started, or was stopped. */
export class NotStartedError extends MicrosandboxError {}

/** There is no connection to the server: nothing was sent. */
export class ServerUnreachableError extends MicrosandboxError {}

/** The connection ended before the answer came: what was asked for may have happened, or not. */
export class ConnectionLostError extends MicrosandboxError {}

/** No answer came in time. The server interrupts what was asked for. */
export class RequestTimeoutError extends MicrosandboxError {}

/** The answer is not that of msbd, but perhaps of a proxy before it. */
export class UnexpectedAnswerError extends MicrosandboxError {}

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
  [-32603, InternalError],
]);

// On the prototypes, since bundlers may rename the classes.
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
  UnavailableError,
  InternalError,
  ConfigError,
  NotStartedError,
  ServerUnreachableError,
  ConnectionLostError,
  RequestTimeoutError,
  UnexpectedAnswerError,
};
for (const [name, kind] of Object.entries(names)) {
  Object.defineProperty(kind.prototype, "name", { value: name, configurable: true, writable: true });
}
