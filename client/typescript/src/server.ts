import * as http from "node:http";
import * as https from "node:https";
import type { Socket } from "node:net";
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import type { Config } from "./config.js";
import * as errors from "./errors.js";
import { version } from "./version.js";

const path = "/api/v1/rpc";

/** How often a call is sent that surely, or harmlessly, did not run before; and the pauses between, in ms. */
const maxAttempts = 3;
const firstPause = 100;
const longestPause = 10_000;

/** Milliseconds until there is a connection. */
const connectLimit = 10_000;
/** Milliseconds that an unused connection is kept; less than the server does, so that none is closed under a call. */
const idleLimit = 30_000;
/** Milliseconds after which to ask a silent connection whether the server's machine is still there. */
const keepAliveDelay = 60_000;
/** The longest time that setTimeout takes, in ms. */
const longestTimer = 2 ** 31 - 1;
/** More than the server lets a run print, in the longest spelling, in bytes. */
const maxAnswer = 256 << 20;

/** One call of a method. */
export interface Call {
  method: string;
  /** Members that are undefined are not sent. */
  params: Record<string, unknown>;
  /** Seconds to wait for the answer; undefined or 0 is as long as the signal lets it. */
  limit?: number | undefined;
  /** A second run of it does no harm. */
  repeatable?: boolean;
  signal?: AbortSignal | undefined;
}

interface Answer {
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
   * Makes a call and returns its result. When the signal aborts, it throws the signal's reason; that closes
   * the connection, and the server ends the run.
   *
   * It is sent again only when that cannot run anything twice: when nothing listened, when the server was too
   * busy to begin it, or when it is repeatable and the connection was lost or the server not ready. What the
   * server asks to wait is waited for, up to 10 s and within the call's limit.
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
          const pause = pauseAfter(error, attempt, call.repeatable ?? false);
          if (pause === undefined || Date.now() + pause > deadline) throw error;
          await sleep(pause, undefined, { signal: ended.signal }).catch(() => ended.signal.throwIfAborted());
        }
      }
    } finally {
      clearTimeout(timer);
      call.signal?.removeEventListener("abort", onAbort);
    }
  }

  async #post({ method, params }: Call, signal: AbortSignal): Promise<Answer> {
    const secure = this.#url.protocol === "https:";
    const headers: http.OutgoingHttpHeaders = {
      "Content-Type": "application/json",
      "User-Agent": `microsandbox-js/${version}`,
    };
    if (this.config.key) headers.Authorization = `Bearer ${this.config.key.reveal()}`;
    // Two turns of the event loop, of which one surely polls: it sees which idle connections the server closed.
    await nextTurn();
    await nextTurn();
    let connected = false;
    try {
      const response = await new Promise<http.IncomingMessage>((resolve, reject) => {
        const agent = this.#agent ?? (secure ? tls : plain).take();
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
        if (length > maxAnswer) {
          throw new errors.UnexpectedAnswerError(`${method}: the answer is longer than ${maxAnswer >> 20} MiB`);
        }
      }
      return { status: response.statusCode ?? 0, headers: response.headers, body: Buffer.concat(chunks).toString() };
    } catch (error) {
      if (error instanceof errors.MicrosandboxError) throw error;
      throw this.#explain(error as NodeJS.ErrnoException, method, connected);
    }
  }

  /** Turns the platform's error into one that says what to do about it. */
  #explain(cause: NodeJS.ErrnoException, method: string, connected: boolean): errors.MicrosandboxError {
    const { serverUrl } = this.config;
    const code = cause.code ?? "";
    if (code.startsWith("HPE_")) {
      return new errors.UnexpectedAnswerError(`the answer is not HTTP: ${hint}`, { cause });
    }
    if (connected) {
      return new errors.ConnectionLostError(
        `${method}: the connection to ${serverUrl} ended before the answer came (${cause.message}): ` +
          "it may have been done, or not",
        { cause },
      );
    }
    if (code === "ECONNREFUSED") {
      return new errors.ServerUnreachableError(
        `nothing listens at ${serverUrl}. Start it with 'msb server start', or name another server with MSB_SERVER_URL`,
        { cause },
      );
    }
    let todo = hint;
    if (code === "EPROTO" || code.startsWith("ERR_SSL_")) {
      todo = "if the server speaks plain http, use http:// on its own machine; elsewhere have TLS set up";
    } else if (/CERT|SIGNATURE/.test(code)) {
      todo =
        "use the name that the server's certificate is for; " +
        "if its authority is your own, name the file of that one's certificate in NODE_EXTRA_CA_CERTS";
    }
    // That of several addresses that were tried has no message.
    const why = cause.message || code;
    return new errors.ServerUnreachableError(`no connection to ${serverUrl}: ${why}; ${todo}`, { cause });
  }
}

const hint = "see whether the server runs and its URL is right";

/** Keeps connections open for the next calls, of all sandboxes. */
class Connections {
  readonly #make: (options: http.AgentOptions) => http.Agent;
  #agent: http.Agent | undefined;
  #usedAt = 0;

  constructor(make: (options: http.AgentOptions) => http.Agent) {
    this.#make = make;
  }

  take(): http.Agent {
    const now = Date.now();
    // By the clock, too: a machine that slept did not see them close.
    if (!this.#agent || now - this.#usedAt > idleLimit) {
      this.#agent = this.#make({
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

const plain = new Connections((options) => new http.Agent(options));
const tls = new Connections((options) => new https.Agent(options));

/** Milliseconds to wait before a call is sent again; undefined if it must not be. */
function pauseAfter(error: unknown, attempt: number, repeatable: boolean): number | undefined {
  if (attempt >= maxAttempts || !(error instanceof errors.MicrosandboxError)) return undefined;
  const refused = error instanceof errors.ServerUnreachableError && codeOf(error.cause) === "ECONNREFUSED";
  // Without Retry-After, 429 is also the answer to a run that began, and was ended since it printed too much.
  const turnedAway = error.status === 429 && error.retryAfter !== undefined;
  const harmless = error instanceof errors.ConnectionLostError || error.status === 429 || error.status === 503;
  if (!refused && !turnedAway && !(repeatable && harmless)) return undefined;
  const pause = Math.max(firstPause * 2 ** (attempt - 1), (error.retryAfter ?? 0) * 1000);
  // Longer by chance, so that many do not come back at once.
  return pause > longestPause ? undefined : pause * (1 + Math.random() / 4);
}

function codeOf(error: unknown): unknown {
  return (error as NodeJS.ErrnoException | undefined)?.code;
}

/** Returns what an answer holds, or throws the error that it tells. keyless: the call had no API key. */
function resultOf(answer: Answer, keyless: boolean): unknown {
  const data = parse(answer);
  const error = data?.error as { code?: unknown; message?: unknown } | undefined;
  if (typeof error?.code === "number") {
    let message = String(error.message);
    if (keyless && error.code === -32002) {
      message += ". None was sent: pass apiKey, or set MSB_API_KEY in the environment or in a .env file";
    }
    throw failure(answer, message, error.code);
  }
  if (answer.status === 200 && data && "result" in data) return data.result;
  throw foreign(answer);
}

/** The JSON object of an answer; undefined if it is none. */
function parse({ headers, body }: Answer): Record<string, unknown> | undefined {
  if (headers["content-type"]?.split(";")[0]?.trim().toLowerCase() !== "application/json") return undefined;
  try {
    const data: unknown = JSON.parse(body);
    return typeof data === "object" && data !== null ? (data as Record<string, unknown>) : undefined;
  } catch {
    return undefined;
  }
}

/** The error of an answer that msbd does not give. */
function foreign(answer: Answer): errors.MicrosandboxError {
  const { status, headers, body } = answer;
  let message =
    `the answer (HTTP status ${status}) is not that of msbd; ` +
    "see whether the server's URL is right, and what a proxy before it says";
  if (status >= 300 && status < 400 && headers.location !== undefined) {
    message =
      `the server sends on to ${JSON.stringify(headers.location)}; that is not followed, ` +
      "since the API key would go along: use the URL that is meant";
  } else if (body.startsWith("Client sent an HTTP request to an HTTPS server")) {
    message = "the server speaks TLS: use https:// in its URL";
  }
  return failure(answer, message);
}

/** The classes of what proxies answer, and of the codes of newer servers. */
const errorsByStatus: ReadonlyMap<number, typeof errors.MicrosandboxError> = new Map([
  [401, errors.AuthenticationError],
  [403, errors.PermissionDeniedError],
  [429, errors.ResourceExhaustedError],
  [502, errors.UnavailableError],
  [503, errors.UnavailableError],
  [504, errors.UnavailableError],
]);

function failure({ status, headers }: Answer, message: string, code?: number): errors.MicrosandboxError {
  const details: errors.ErrorDetails = { status };
  if (code !== undefined) details.code = code;
  const requestId = headers["x-request-id"];
  if (typeof requestId === "string") details.requestId = requestId;
  const seconds = secondsOf(headers["retry-after"]);
  if (seconds !== undefined) details.retryAfter = seconds;
  const Kind = errors.errorsByCode.get(code ?? 0) ?? errorsByStatus.get(status) ?? errors.UnexpectedAnswerError;
  return new Kind(message, details);
}

/** Reads the header Retry-After, in seconds or as a date. */
function secondsOf(header: string | undefined): number | undefined {
  if (header === undefined) return undefined;
  if (/^\d+$/.test(header)) return Number(header);
  const at = Date.parse(header);
  return Number.isNaN(at) ? undefined : Math.max(0, (at - Date.now()) / 1000);
}
