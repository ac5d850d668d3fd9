import * as http from "node:http";
import * as https from "node:https";
import type { Socket } from "node:net";
import { pipeline } from "node:stream/promises";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { unexpectedFormat } from "./check.js";
import type { Config } from "./config.js";
import * as errors from "./errors.js";
import { version } from "./version.js";

const path = "/rpc";

/**
 * The maximum number of attempts of a call that did not begin or is safe to repeat, and the pauses between the attempts
 * in ms.
 */
const maxAttempts = 3;
const firstPause = 100;
const longestPause = 10_000;

/** Milliseconds to wait for a connection. */
const connectLimit = 10_000;
/** Milliseconds that an idle connection is kept. Less than on the server, so that it closes none during a call. */
const idleLimit = 30_000;
/** Milliseconds without traffic after which TCP keep-alive checks that the server's machine is still up. */
const keepAliveDelay = 60_000;
/** The longest time that setTimeout accepts, in ms. */
const longestTimer = 2 ** 31 - 1;
/** Maximum size of a response in bytes: more than the output limit of a run with every byte escaped in JSON. */
const maxResponse = 256 << 20;

/**
 * Milliseconds that a response may pause. A stream of events never pauses that long, because the server sends a comment
 * every 15 s.
 */
const silenceLimit = 60_000;

/** What limits a call. */
interface Limits {
  /** Seconds to wait for the response, or until a stream of events has ended; undefined or 0 means no limit. */
  limit?: number | undefined;
  /** Making the call twice does no harm. */
  idempotent?: boolean;
  signal?: AbortSignal | undefined;
}

/** One call of a method. */
export interface Call extends Limits {
  method: string;
  /** Undefined members are not sent. */
  params: Record<string, unknown>;
}

/** An event of a stream. Its data is a JSON object. */
export interface ServerEvent {
  name: string;
  data: Record<string, unknown>;
}

/** A request for a path other than that of the methods. */
export interface Transfer extends Limits {
  method: "GET" | "PUT";
  /** The path below /api/v1, with the query. */
  path: string;
  headers?: http.OutgoingHttpHeaders;
  /** The body, or a function that returns its pieces. */
  body?: Uint8Array | (() => AsyncIterable<Uint8Array>);
}

/** An HTTP request. */
interface Request {
  /** The name of the call in messages. */
  name: string;
  method: string;
  url: URL;
  headers?: http.OutgoingHttpHeaders;
  body?: string | Uint8Array | (() => AsyncIterable<Uint8Array>) | undefined;
}

interface Response {
  status: number;
  headers: http.IncomingHttpHeaders;
  body: string;
}

/** Makes calls to msbd over HTTP. */
export class Server {
  readonly config: Config;
  readonly #agent: http.Agent | undefined;

  constructor(config: Config, agent?: http.Agent) {
    this.config = config;
    this.#agent = agent;
  }

  /**
   * Makes a call and returns its result. If the signal aborts, it closes the connection, so that the server ends the
   * run, and throws the signal's reason.
   *
   * The call is retried only if that cannot run anything twice: if the connection was refused, if the server was too
   * busy to begin the call, or if the call is idempotent and the connection was lost or the server was not ready. It
   * waits before a retry as long as the server asks, up to 10 s and within the call's limit.
   */
  async call(call: Call): Promise<unknown> {
    const end = new CallEnd(call.method, call);
    try {
      return await this.#attempts(call, end, async () => {
        const response = await this.#send(this.#post(call), end.signal);
        return this.#resultOf(await this.#read(response, call.method));
      });
    } finally {
      end.release();
    }
  }

  /**
   * Makes a call and returns its events. The last one is named result, and its data is the result. The call is retried
   * like others, but only before its first event. Ending the iteration ends the call.
   */
  async *events(call: Call): AsyncGenerator<ServerEvent> {
    const { method } = call;
    const end = new CallEnd(method, call);
    let response: http.IncomingMessage | undefined;
    try {
      response = await this.#attempts(call, end, async () => {
        const response = await this.#send(this.#post(call, { Accept: "text/event-stream" }), end.signal);
        if (response.statusCode === 200 && mediaType(response.headers) === "text/event-stream") return response;
        this.#resultOf(await this.#read(response, method));
        throw unexpectedFormat(`the response to ${method} has`);
      });
      // Read the response to its end before the result is used, so that its connection can be used again.
      let result: ServerEvent | undefined;
      for await (const event of parseEvents(this.#pieces(response, method), method)) {
        if (event.name === "error") throw this.#errorIn(event.data);
        if (event.name === "result") result = event;
        else yield event;
      }
      if (result) {
        yield result;
        return;
      }
      throw new errors.ConnectionLostError(
        `${method}: the connection to ${this.config.serverUrl} ended before the result: the call may have taken effect`,
      );
    } catch (error) {
      end.signal.throwIfAborted();
      throw error;
    } finally {
      end.release();
      response?.destroy();
    }
  }

  /** Makes a request for another path, and returns the JSON of its response. */
  async put(transfer: Transfer): Promise<unknown> {
    const name = `PUT ${transfer.path.replace(/\?.*/, "")}`;
    const end = new CallEnd(name, transfer);
    try {
      return await this.#attempts(transfer, end, async () => {
        const response = await this.#read(await this.#send(this.#other(transfer, name), end.signal), name);
        const data = parse(response);
        if (response.status >= 200 && response.status < 300 && data && !data.error) return data;
        return this.#resultOf(response);
      });
    } finally {
      end.release();
    }
  }

  /** Makes a request for another path, and returns the pieces of the body of its response. */
  async *get(transfer: Transfer): AsyncGenerator<Buffer> {
    const name = `GET ${transfer.path.replace(/\?.*/, "")}`;
    const end = new CallEnd(name, transfer);
    let response: http.IncomingMessage | undefined;
    try {
      response = await this.#attempts(transfer, end, async () => {
        const response = await this.#send(this.#other(transfer, name), end.signal);
        // A file may contain anything, also JSON that looks like an error.
        if (response.statusCode === 200) return response;
        throw this.#refusal(await this.#read(response, name));
      });
      yield* this.#pieces(response, name);
    } catch (error) {
      end.signal.throwIfAborted();
      throw error;
    } finally {
      end.release();
      response?.destroy();
    }
  }

  /** What a WebSocket for a path below /api/v1 needs: its URL, and options for the package ws. */
  webSocket(path: string): { url: URL; options: { agent: http.Agent; headers: Record<string, string> } } {
    const url = this.#url(path);
    const agent = this.#agentFor(url);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    return { url, options: { agent, headers: this.#headers() } };
  }

  /** Returns the error for a response that refuses a WebSocket. */
  async webSocketRefusal(response: http.IncomingMessage): Promise<errors.MicrosandboxError> {
    return this.#refusal(await this.#read(response, "the WebSocket"));
  }

  /** Returns the error for a WebSocket that could not be opened, or was lost. */
  webSocketError(cause: NodeJS.ErrnoException, connected: boolean): errors.MicrosandboxError {
    return this.#convertError(cause, "the WebSocket", connected);
  }

  /** Returns the error for a text message of a WebSocket, which contains an error. */
  webSocketFailure(message: string): errors.MicrosandboxError {
    try {
      const { error } = JSON.parse(message) as { error?: unknown };
      if (isErrorData(error)) return this.#errorIn(error);
    } catch {
      // The error below says it.
    }
    return unexpectedFormat("a message of the WebSocket has");
  }

  /** Repeats an attempt as long as that is safe. */
  async #attempts<T>({ idempotent }: Limits, end: CallEnd, attempt: () => Promise<T>): Promise<T> {
    for (let n = 1; ; n++) {
      try {
        return await attempt();
      } catch (error) {
        end.signal.throwIfAborted();
        const pause = pauseAfter(error, n, idempotent ?? false);
        if (pause === undefined || Date.now() + pause > end.deadline) throw error;
        await sleep(pause, undefined, { signal: end.signal }).catch(() => end.signal.throwIfAborted());
      }
    }
  }

  #post({ method, params }: Call, headers: http.OutgoingHttpHeaders = {}): Request {
    return {
      name: method,
      method: "POST",
      url: this.#url(path),
      headers: { "Content-Type": "application/json", ...headers },
      body: JSON.stringify({ jsonrpc: "2.0", method, params, id: 1 }),
    };
  }

  #other({ path, ...transfer }: Transfer, name: string): Request {
    return { ...transfer, name, url: this.#url(path) };
  }

  #url(path: string): URL {
    return new URL(`${this.config.serverUrl}/api/v1${path}`);
  }

  #agentFor(url: URL): http.Agent {
    return this.#agent ?? (url.protocol === "https:" ? tlsAgents : plainAgents).agent();
  }

  #headers(): Record<string, string> {
    const headers: Record<string, string> = { "User-Agent": `microsandbox-js/${version}` };
    if (this.config.key) headers.Authorization = `Bearer ${this.config.key.reveal()}`;
    return headers;
  }

  /** Sends a request and returns its response, whose body is not read yet. */
  async #send({ name, method, url, headers, body }: Request, signal: AbortSignal): Promise<http.IncomingMessage> {
    const secure = url.protocol === "https:";
    // Wait for two turns of the event loop. At least one of them polls, and notices idle connections that the server
    // has closed.
    await nextTurn();
    await nextTurn();
    let connected = false;
    /** The error of the program that provides the body. */
    let failed: { error: unknown } | undefined;
    try {
      return await new Promise<http.IncomingMessage>((resolve, reject) => {
        const options = { method, headers: { ...this.#headers(), ...headers }, agent: this.#agentFor(url), signal };
        const request = (secure ? https : http).request(url, options);
        request.on("response", resolve).on("error", reject);
        // A response to a part of the body is an error, so that the rest is of no use.
        request.on("response", (response) =>
          response.once("close", () => request.writableFinished || request.destroy()),
        );
        request.once("socket", (socket: Socket) => {
          if (!socket.connecting) {
            connected = true;
            return;
          }
          const timer = setTimeout(() => request.destroy(new Error("connect ETIMEDOUT")), connectLimit);
          request.once("close", () => clearTimeout(timer));
          socket.once(secure ? "secureConnect" : "connect", () => {
            connected = true;
            clearTimeout(timer);
          });
        });
        if (typeof body !== "function") {
          request.end(body);
          return;
        }
        const pieces = async function* () {
          try {
            yield* body();
          } catch (error) {
            failed = { error };
            throw error;
          }
        };
        // If the server responds before it has read everything, the response says why.
        pipeline(pieces, request).catch(reject);
      });
    } catch (error) {
      if (failed) throw failed.error;
      throw this.#convertError(error as NodeJS.ErrnoException, name, connected);
    }
  }

  /** Reads a response that is not a stream. */
  async #read(response: http.IncomingMessage, name: string): Promise<Response> {
    const chunks: Buffer[] = [];
    let length = 0;
    for await (const chunk of this.#pieces(response, name, 0)) {
      chunks.push(chunk);
      length += chunk.length;
      if (length > maxResponse) {
        throw new errors.UnexpectedAnswerError(`${name}: the response is longer than ${maxResponse >> 20} MiB`);
      }
    }
    return { status: response.statusCode ?? 0, headers: response.headers, body: Buffer.concat(chunks).toString() };
  }

  /** Reads the body of a response. With a limit, it fails if nothing arrives for so many ms. */
  async *#pieces(response: http.IncomingMessage, name: string, limit = silenceLimit): AsyncGenerator<Buffer> {
    let timer: NodeJS.Timeout | undefined;
    // Count only the time in which this waits for the server, and not the time in which the program uses a piece.
    const wait = () => {
      const silent = () => response.destroy(new Error(`nothing arrived for ${limit / 1000} s`));
      if (limit > 0) timer = setTimeout(silent, limit);
    };
    wait();
    try {
      for await (const piece of response as AsyncIterable<Buffer>) {
        clearTimeout(timer);
        yield piece;
        wait();
      }
    } catch (error) {
      throw this.#convertError(error as NodeJS.ErrnoException, name, true);
    } finally {
      clearTimeout(timer);
    }
  }

  /** Returns the result in a response, or throws its error. */
  #resultOf(response: Response): unknown {
    const data = parse(response);
    if (response.status === 200 && data && "result" in data && !isErrorData(data.error)) return data.result;
    throw this.#refusal(response);
  }

  /** Returns the error in a response. */
  #refusal(response: Response): errors.MicrosandboxError {
    const error = parse(response)?.error;
    return isErrorData(error) ? this.#errorIn(error, response) : notFromMsbdError(response);
  }

  /** Returns the error for a member error of a response, or for an event error of a stream. */
  #errorIn(error: ErrorData, response?: Response): errors.MicrosandboxError {
    let message = String(error.message);
    // The server's message is about HTTP headers.
    if (error.code === -32002) message = this.config.key === undefined ? noKey : badKey;
    return errorOf(message, response, error);
  }

  /** Converts an error of the platform into one that says what to do. */
  #convertError(cause: NodeJS.ErrnoException, method: string, connected: boolean): errors.MicrosandboxError {
    const { serverUrl } = this.config;
    const code = cause.code ?? "";
    if (code.startsWith("HPE_")) {
      return new errors.UnexpectedAnswerError(`the response is not HTTP: ${hint}`, { cause });
    }
    if (connected) {
      return new errors.ConnectionLostError(
        `${method}: the connection to ${serverUrl} ended before the response (${cause.message}): ` +
          "the call may have taken effect",
        { cause },
      );
    }
    if (code === "ECONNREFUSED") {
      return new errors.ServerUnreachableError(
        `nothing listens at ${serverUrl}. Start it with 'msb server start', ` +
          "or set MSB_SERVER_URL to the URL of another server",
        { cause },
      );
    }
    let advice = hint;
    if (code === "EPROTO" || code.startsWith("ERR_SSL_")) {
      advice =
        "if the server speaks plain http, use http:// on its own machine; " +
        "elsewhere, ask its administrator to set up TLS";
    } else if (/CERT|SIGNATURE/.test(code)) {
      advice =
        "use the name that the server's certificate is for; " +
        "if its authority is your own, set NODE_EXTRA_CA_CERTS to the file of the authority's certificate";
    }
    // If several addresses were tried, the error has no message.
    const reason = cause.message || code;
    return new errors.ServerUnreachableError(`no connection to ${serverUrl}: ${reason}; ${advice}`, { cause });
  }
}

const hint = "check that the server is running and that its URL is right";

/** Ends a call at its time limit, or when its signal aborts. */
class CallEnd {
  readonly deadline: number;
  readonly #given: AbortSignal | undefined;
  readonly #ended = new AbortController();
  readonly #timer: NodeJS.Timeout;
  readonly #onAbort = () => this.#ended.abort(this.#given?.reason);

  constructor(name: string, { limit, signal }: Limits) {
    signal?.throwIfAborted();
    this.#given = signal;
    signal?.addEventListener("abort", this.#onAbort);
    const ms = limit ? Math.min(limit * 1000, longestTimer) : longestTimer;
    this.deadline = Date.now() + ms;
    this.#timer = setTimeout(() => {
      this.#ended.abort(new errors.RequestTimeoutError(`${name}: no answer within ${ms / 1000} s`));
    }, ms);
  }

  /** Aborts when the call must end. Its reason is the error to throw. */
  get signal(): AbortSignal {
    return this.#ended.signal;
  }

  release(): void {
    clearTimeout(this.#timer);
    this.#given?.removeEventListener("abort", this.#onAbort);
  }
}

/** Keeps connections open for later calls of all sandboxes. */
class AgentPool {
  readonly #newAgent: (options: http.AgentOptions) => http.Agent;
  #agent: http.Agent | undefined;
  #usedAt = 0;

  constructor(newAgent: (options: http.AgentOptions) => http.Agent) {
    this.#newAgent = newAgent;
  }

  agent(): http.Agent {
    const now = Date.now();
    // Also check the clock, because a machine that was suspended did not notice that the connections were closed.
    if (!this.#agent || now - this.#usedAt > idleLimit) {
      this.#agent = this.#newAgent({
        keepAlive: true,
        keepAliveMsecs: keepAliveDelay,
        keepAliveInitialDelay: keepAliveDelay,
        timeout: idleLimit,
      } as http.AgentOptions);
    }
    this.#usedAt = now;
    return this.#agent;
  }
}

const plainAgents = new AgentPool((options) => new http.Agent(options));
const tlsAgents = new AgentPool((options) => new https.Agent(options));

/** Returns the milliseconds to wait before a retry; undefined if the call must not be retried. */
function pauseAfter(error: unknown, attempt: number, idempotent: boolean): number | undefined {
  if (attempt >= maxAttempts || !(error instanceof errors.MicrosandboxError)) return undefined;
  const unconnected = error instanceof errors.ServerUnreachableError && codeOf(error.cause) === "ECONNREFUSED";
  // With Retry-After, 429 means that the server refused the call before it began. Without it, 429 can also mean that
  // the run began and was ended because it printed too much.
  const refused = error.status === 429 && error.retryAfter !== undefined;
  const harmless = error instanceof errors.ConnectionLostError || error.status === 429 || error.status === 503;
  if (!unconnected && !refused && !(idempotent && harmless)) return undefined;
  const pause = Math.max(firstPause * 2 ** (attempt - 1), (error.retryAfter ?? 0) * 1000);
  // Add a random time, so that many clients do not retry at the same time.
  return pause > longestPause ? undefined : pause * (1 + Math.random() / 4);
}

function codeOf(error: unknown): unknown {
  return (error as NodeJS.ErrnoException | undefined)?.code;
}

const noKey =
  "missing or invalid API key. No API key was sent: pass apiKey, or set MSB_API_KEY in the environment or a .env file";
const badKey = "missing or invalid API key: check apiKey or MSB_API_KEY";

/** The member error of a response. */
interface ErrorData {
  code?: unknown;
  message?: unknown;
  data?: unknown;
}

function isErrorData(error: unknown): error is ErrorData {
  return typeof (error as ErrorData | null | undefined)?.code === "number";
}

function mediaType(headers: http.IncomingHttpHeaders): string | undefined {
  return headers["content-type"]?.split(";")[0]?.trim().toLowerCase();
}

/** Parses a stream of server-sent events. */
async function* parseEvents(pieces: AsyncIterable<Buffer>, method: string): AsyncGenerator<ServerEvent> {
  const decoder = new TextDecoder();
  let rest = "";
  let name = "";
  let data = "";
  for await (const piece of pieces) {
    const lines = decoder.decode(piece, { stream: true }).split("\n");
    lines[0] = rest + lines[0];
    rest = lines.pop() ?? "";
    if (rest.length > maxResponse) {
      throw new errors.UnexpectedAnswerError(`${method}: an event is longer than ${maxResponse >> 20} MiB`);
    }
    for (const line of lines) {
      if (line.startsWith("event: ")) {
        name = line.slice(7);
      } else if (line.startsWith("data: ")) {
        data += line.slice(6);
      } else if (line === "" && name !== "") {
        yield { name, data: parseData(data, method) };
        name = data = "";
      }
    }
  }
}

function parseData(text: string, method: string): Record<string, unknown> {
  try {
    const data: unknown = JSON.parse(text);
    if (typeof data === "object" && data !== null) return data as Record<string, unknown>;
  } catch {
    // The error below says it.
  }
  throw unexpectedFormat(`an event of ${method} has`);
}

/** Returns the JSON object in a response; undefined if it contains none. */
function parse({ headers, body }: Response): Record<string, unknown> | undefined {
  if (mediaType(headers) !== "application/json") return undefined;
  try {
    const data: unknown = JSON.parse(body);
    return typeof data === "object" && data !== null ? (data as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

/** Returns the error for a response that is not from msbd. */
function notFromMsbdError(response: Response): errors.MicrosandboxError {
  const { status, headers, body } = response;
  let message =
    `the response (HTTP status ${status}) is not from msbd: ` +
    "check the server's URL and the logs of any proxy in front of the server";
  if (status >= 300 && status < 400 && headers.location !== undefined) {
    message =
      `the server redirects to ${JSON.stringify(headers.location)}. Redirects are not followed, because the API key ` +
      "would be sent along: set the server's URL to the right one";
  } else if (body.startsWith("Client sent an HTTP request to an HTTPS server")) {
    message = "the server speaks TLS: use https:// in its URL";
  }
  return errorOf(message, response);
}

/** The classes for the statuses of proxies, and for error codes of newer servers. */
const errorsByStatus: ReadonlyMap<number, typeof errors.MicrosandboxError> = new Map([
  [401, errors.AuthenticationError],
  [403, errors.PermissionDeniedError],
  [429, errors.ResourceExhaustedError],
  [502, errors.UnavailableError],
  [503, errors.UnavailableError],
  [504, errors.UnavailableError],
]);

/** Returns the error with a message. An error in a stream has no response of its own. */
function errorOf(message: string, response?: Response, error: ErrorData = {}): errors.MicrosandboxError {
  const details: errors.ErrorDetails = {};
  if (response) details.status = response.status;
  if (typeof error.code === "number") details.code = error.code;
  const data = typeof error.data === "object" && error.data !== null ? (error.data as Record<string, unknown>) : {};
  if (Object.keys(data).length > 0) details.data = data;
  const requestId = response?.headers["x-request-id"] ?? data.request_id;
  if (typeof requestId === "string") details.requestId = requestId;
  const seconds = secondsOf(response?.headers["retry-after"]) ?? data.retry_after;
  if (typeof seconds === "number") details.retryAfter = seconds;
  const Kind =
    errors.errorsByCode.get(details.code ?? 0) ??
    errorsByStatus.get(response?.status ?? 0) ??
    errors.UnexpectedAnswerError;
  return new Kind(message, details);
}

/** Parses the Retry-After header, which is a number of seconds or a date. Returns seconds. */
function secondsOf(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  if (/^\d+$/.test(header)) return Number(header);
  const at = Date.parse(header);
  return Number.isNaN(at) ? undefined : Math.max(0, (at - Date.now()) / 1000);
}
