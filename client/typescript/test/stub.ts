// A stub server for the tests. It uses real HTTP on this machine, and each test sets its responses.

import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export const testKey = "msb_v2.public.canary-of-the-unit-tests";

/** A URL on which nothing ever listens. The port of a closed stub would not do, because another stub may get it. */
export const unused = "http://127.0.0.1:1";

const programParams = ["cwd", "envs", "user"];
const processParams = ["pid", "tag"];

/** The required and the known params of each of the server's methods. */
const methods: Record<string, { required: string[]; known: string[] }> = {
  "sandbox.start": { required: ["sandbox"], known: ["config"] },
  "sandbox.stop": { required: ["sandbox"], known: [] },
  "sandbox.repl.run": {
    required: ["sandbox", "code"],
    known: [...programParams, "language", "timeout", "stdin", "encoding", "context", "results"],
  },
  "sandbox.command.run": {
    required: ["sandbox", "command"],
    known: [...programParams, "args", "timeout", "stdin", "encoding"],
  },
  "sandbox.context.create": { required: ["sandbox", "language"], known: ["context", "cwd", "user"] },
  "sandbox.context.list": { required: ["sandbox"], known: [] },
  "sandbox.context.restart": { required: ["sandbox", "context"], known: [] },
  "sandbox.context.remove": { required: ["sandbox", "context"], known: [] },
  "sandbox.process.start": {
    required: ["sandbox", "command"],
    known: [...programParams, "args", "timeout", "stdin", "encoding", "open_stdin", "terminal", "tag"],
  },
  "sandbox.process.list": { required: ["sandbox"], known: [] },
  "sandbox.process.get": { required: ["sandbox"], known: processParams },
  "sandbox.process.input": { required: ["sandbox"], known: [...processParams, "data", "encoding", "close"] },
  "sandbox.process.resize": { required: ["sandbox", "cols", "rows"], known: processParams },
  "sandbox.process.logs": { required: ["sandbox"], known: [...processParams, "encoding"] },
  "sandbox.process.signal": { required: ["sandbox", "signal"], known: [...processParams, "all"] },
  "sandbox.process.connect": { required: ["sandbox"], known: [...processParams, "replay", "encoding"] },
  "sandbox.fs.list": { required: ["sandbox", "path"], known: ["depth"] },
  "sandbox.fs.stat": { required: ["sandbox", "path"], known: [] },
  "sandbox.fs.exists": { required: ["sandbox", "path"], known: [] },
  "sandbox.fs.mkdir": { required: ["sandbox", "path"], known: ["mode", "user"] },
  "sandbox.fs.move": { required: ["sandbox", "from", "to"], known: [] },
  "sandbox.fs.remove": { required: ["sandbox", "path"], known: ["recursive"] },
  "sandbox.fs.watch": { required: ["sandbox", "path"], known: ["recursive"] },
  "sandbox.list": { required: [], known: ["after", "limit"] },
  "sandbox.get": { required: ["sandbox"], known: [] },
  "sandbox.metrics.get": { required: [], known: ["sandbox"] },
  "GET files": { required: ["path"], known: [] },
  "PUT files": { required: ["path"], known: ["mode", "user"] },
};

export const info = {
  namespace: "default",
  name: "my-env",
  id: "1f0c9a2b5d6e7f803a4b",
  state: "failed",
  reason: "its start failed",
  image: "microsandbox/python",
  cpus: 1,
  memory: 512,
  disk: 4096,
  created_at: "2026-01-02T03:04:05Z",
};

const results: Record<string, unknown> = {
  "sandbox.start": "Sandbox my-env started successfully",
  "sandbox.stop": "Sandbox my-env stopped successfully",
  "sandbox.repl.run": { status: "success", language: "python", output: [{ stream: "stdout", text: "42" }] },
  "sandbox.command.run": {
    command: "sh",
    args: ["-c", "echo hello; echo no >&2; exit 3"],
    exit_code: 3,
    success: false,
    output: [
      { stream: "stdout", text: "hello" },
      { stream: "stderr", text: "no" },
    ],
  },
  "sandbox.list": { sandboxes: [info] },
  "sandbox.get": info,
  "sandbox.metrics.get": {
    sandboxes: [
      {
        namespace: "default",
        name: "my-env",
        state: "running",
        running: true,
        cpu_usage: 12.5,
        memory_usage: 256,
        disk_usage: 1099511627776,
      },
    ],
  },
};

/** A response. A body that begins with { or [ is sent as JSON. */
export interface Reply {
  status: number;
  body: string;
  headers?: Record<string, string>;
}

/** A custom handler, which may also not answer. */
export type Behavior = (request: IncomingMessage, response: ServerResponse) => unknown;

export function ok(result: unknown): Reply {
  return { status: 200, body: JSON.stringify({ jsonrpc: "2.0", result, id: 1 }) };
}

export function errorReply(status: number, code: number, headers: Record<string, string> = {}): Reply {
  return { status, body: JSON.stringify({ jsonrpc: "2.0", error: { code, message: "it is so" }, id: 1 }), headers };
}

/** Sends a stream of events, in pieces of a few bytes. Without a last event result or error, it breaks off properly. */
export function events(...events: [name: string, data: unknown][]): Behavior {
  const text = events
    .map(([name, data]) => `event: ${name}\ndata: ${JSON.stringify(data)}\n\n: keep-alive\n\n`)
    .join("");
  return async (_, response) => {
    response.setHeader("Content-Type", "text/event-stream");
    const bytes = Buffer.from(text);
    for (let i = 0; i < bytes.length; i += 7) {
      await new Promise((resolve) => response.write(bytes.subarray(i, i + 7), resolve));
    }
    response.end();
  };
}

/** Closes the connection without a response. */
export const drop: Behavior = (request) => request.socket.destroy();

/** A request from a client. The method of a file request is GET files or PUT files; its params are the query. */
interface Sent {
  method: string;
  params: Record<string, unknown>;
  headers: IncomingMessage["headers"];
  body: Buffer;
}

/** Answers the calls of each method with its replies in order, repeating the last; the default is results. */
export class Stub implements AsyncDisposable {
  readonly sent: Sent[] = [];
  /** Requests that a real server would refuse. */
  readonly violations: string[] = [];
  connections = 0;
  readonly http: Server;
  readonly #replies = new Map<string, (Reply | Behavior)[]>();

  constructor() {
    this.http = createServer((request, response) => void this.#serve(request, response));
    this.http.keepAliveTimeout = 0; // keep idle connections open, even on a slow machine
    this.http.on("connection", () => this.connections++);
  }

  static async start(): Promise<Stub> {
    const stub = new Stub();
    await new Promise<void>((resolve, reject) => {
      stub.http.once("error", reject).listen(0, "127.0.0.1", resolve);
    });
    return stub;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.http.address() as AddressInfo).port}`;
  }

  /** The options with which a client connects to the stub. */
  get access(): { serverUrl: string; apiKey: string } {
    return { serverUrl: this.url, apiKey: testKey };
  }

  answer(method: string, ...replies: (Reply | Behavior)[]): void {
    this.#replies.set(method, replies);
  }

  /** Never answers a method. began resolves when a request arrives, ended when its client closes the connection. */
  hang(method: string): { began: Promise<void>; ended: Promise<void> } {
    const began = withResolvers();
    const ended = withResolvers();
    this.answer(method, (request) => {
      request.socket.once("close", () => ended.resolve());
      began.resolve();
    });
    return { began: began.promise, ended: ended.promise };
  }

  /** The methods that were called, in order. */
  get called(): string[] {
    return this.sent.map(({ method }) => method);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.http.closeAllConnections();
    await new Promise((resolve) => this.http.close(resolve));
    if (this.violations.length > 0) throw new Error(`a real server would refuse ${this.violations.join("\n")}`);
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks);
    const url = new URL(request.url ?? "", "http://stub");
    const isFile = /^\/api\/v1\/sandboxes\/[^/]+\/files$/.test(url.pathname);
    const { method, params, ...rest } = isFile
      ? { method: `${request.method} files`, params: Object.fromEntries(url.searchParams) }
      : JSON.parse(body.toString());
    this.sent.push({ method, params, headers: request.headers, body });
    const { required, known } = methods[method] ?? { required: ["a known method"], known: [] };
    const valid =
      (isFile ||
        (request.method === "POST" &&
          url.pathname === "/api/v1/rpc" &&
          request.headers["content-type"] === "application/json" &&
          JSON.stringify(rest) === '{"jsonrpc":"2.0","id":1}')) &&
      required.every((name) => name in params) &&
      Object.entries(params).every(
        ([name, value]) => [...required, ...known, "namespace"].includes(name) && value !== null,
      );
    if (!valid) this.violations.push(`${request.method} ${request.url} ${body}`);
    const replies = this.#replies.get(method) ?? [ok(results[method])];
    const reply = (replies.length > 1 ? replies.shift() : replies[0]) as Reply | Behavior;
    if (typeof reply === "function") {
      reply(request, response);
      return;
    }
    if (/^[{[]/.test(reply.body)) response.setHeader("Content-Type", "application/json");
    response.setHeader("X-Request-Id", "REQUEST-ID");
    for (const [name, value] of Object.entries(reply.headers ?? {})) response.setHeader(name, value);
    response.writeHead(reply.status).end(reply.body);
  }
}

/** Like Promise.withResolvers, which Node.js 20 does not have. */
function withResolvers(): { promise: Promise<void>; resolve: () => void } {
  let resolve = () => {};
  const promise = new Promise<void>((done) => {
    resolve = done;
  });
  return { promise, resolve };
}
