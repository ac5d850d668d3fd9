import * as http from "node:http";
import * as https from "node:https";
import type { Socket } from "node:net";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import type { Config } from "./config.js";
import * as errors from "./errors.js";
import { version } from "./version.js";

const path = "/api/v1/rpc";

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

/** One call of a method. */
export interface Call {
  method: string;
  /** Undefined members are not sent. */
  params: Record<string, unknown>;
  /** Seconds to wait for the response; undefined or 0 means no limit. */
  limit?: number | undefined;
  /** Making the call twice does no harm. */
  idempotent?: boolean;
  signal?: AbortSignal | undefined;
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
  readonly #url: URL;

  constructor(config: Config, agent?: http.Agent) {
    this.config = config;
    this.#agent = agent;
    this.#url = new URL(config.serverUrl + path);
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
    call.signal?.throwIfAborted();
    const ended = new AbortController();
    const onAbort = () => ended.abort(call.signal?.reason);
    call.signal?.addEventListener("abort", onAbort);
    const limit = call.limit ? Math.min(call.limit * 1000, longestTimer) : longestTimer;
    const deadline = Date.now() + limit;
    const timer = setTimeout(() => {
      ended.abort(new errors.RequestTimeoutError(`${call.method}: no answer within ${limit / 1000} s`));
    }, limit);
    try {
      for (let attempt = 1; ; attempt++) {
        try {
          return resultOf(await this.#post(call, ended.signal), this.config.key === undefined);
        } catch (error) {
          ended.signal.throwIfAborted();
          const pause = pauseAfter(error, attempt, call.idempotent ?? false);
          if (pause === undefined || Date.now() + pause > deadline) throw error;
          await sleep(pause, undefined, { signal: ended.signal }).catch(() => ended.signal.throwIfAborted());
        }
      }
    } finally {
      clearTimeout(timer);
      call.signal?.removeEventListener("abort", onAbort);
    }
  }

  async #post({ method, params }: Call, signal: AbortSignal): Promise<Response> {
    const secure = this.#url.protocol === "https:";
    const headers: http.OutgoingHttpHeaders = {
      "Content-Type": "application/json",
      "User-Agent": `microsandbox-js/${version}`,
    };
    if (this.config.key) headers.Authorization = `Bearer ${this.config.key.reveal()}`;
    // Wait for two turns of the event loop. At least one of them polls, and notices idle connections that the server
    // has closed.
    await nextTurn();
    await nextTurn();
    let connected = false;
    try {
      const response = await new Promise<http.IncomingMessage>((resolve, reject) => {
        const agent = this.#agent ?? (secure ? tlsAgents : plainAgents).agent();
        const request = (secure ? https : http).request(this.#url, { method: "POST", headers, agent, signal });
        request.on("response", resolve).on("error", reject);
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
        request.end(JSON.stringify({ jsonrpc: "2.0", method, params, id: 1 }));
      });
      const chunks: Buffer[] = [];
      let length = 0;
      for await (const chunk of response as AsyncIterable<Buffer>) {
        chunks.push(chunk);
        length += chunk.length;
        if (length > maxResponse) {
          throw new errors.UnexpectedAnswerError(`${method}: the response is longer than ${maxResponse >> 20} MiB`);
        }
      }
      return { status: response.statusCode ?? 0, headers: response.headers, body: Buffer.concat(chunks).toString() };
    } catch (error) {
      if (error instanceof errors.MicrosandboxError) throw error;
      throw this.#convertError(error as NodeJS.ErrnoException, method, connected);
    }
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

/** Returns the result in a response, or throws its error. keyless: the call was sent without an API key. */
function resultOf(response: Response, keyless: boolean): unknown {
  const data = parse(response);
  const error = data?.error as { code?: unknown; message?: unknown } | undefined;
  if (typeof error?.code === "number") {
    let message = String(error.message);
    if (error.code === -32002) message = keyless ? noKey : badKey; // the server's message is about HTTP headers
    throw errorOf(response, message, error.code);
  }
  if (response.status === 200 && data && "result" in data) return data.result;
  throw notFromMsbdError(response);
}

/** Returns the JSON object in a response; undefined if it contains none. */
function parse({ headers, body }: Response): Record<string, unknown> | undefined {
  if (headers["content-type"]?.split(";")[0]?.trim().toLowerCase() !== "application/json") return undefined;
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
  return errorOf(response, message);
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

function errorOf({ status, headers }: Response, message: string, code?: number): errors.MicrosandboxError {
  const details: errors.ErrorDetails = { status };
  if (code !== undefined) details.code = code;
  const requestId = headers["x-request-id"];
  if (typeof requestId === "string") details.requestId = requestId;
  const seconds = secondsOf(headers["retry-after"]);
  if (seconds !== undefined) details.retryAfter = seconds;
  const Kind = errors.errorsByCode.get(code ?? 0) ?? errorsByStatus.get(status) ?? errors.UnexpectedAnswerError;
  return new Kind(message, details);
}

/** Parses the Retry-After header, which is a number of seconds or a date. Returns seconds. */
function secondsOf(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  if (/^\d+$/.test(header)) return Number(header);
  const at = Date.parse(header);
  return Number.isNaN(at) ? undefined : Math.max(0, (at - Date.now()) / 1000);
}
