import "./dispose.js";
import { type AddressInfo, createServer, type Server as Listener, type Socket } from "node:net";
import { checkCallbacks, checkInteger, checkOptions, checkString } from "./check.js";
import type { CallOptions } from "./options.js";
import type { BaseSandbox } from "./sandbox.js";

/** Options of a forwarded port. */
export interface ForwardOptions extends CallOptions {
  /** The port of this machine; the default is one that is free. */
  localPort?: number | undefined;
  /** The address on which to listen; the default is 127.0.0.1, which only programs of this machine can reach. */
  host?: string | undefined;
  /**
   * Is called with the error of a connection that could not be forwarded, or broke off. Without it, the program that
   * connected sees only that its connection ends.
   */
  onError?: ((error: unknown) => void) | undefined;
}

/** Milliseconds to wait for the handshake of a WebSocket. */
const handshakeLimit = 30_000;
/** The maximum size of a message of the server, in bytes. */
const maxMessage = 16 << 20;

/** A port of this machine that leads to a port of a sandbox. */
export class Forward implements AsyncDisposable {
  readonly #sandbox: BaseSandbox;
  readonly #port: number;
  readonly #onError: ((error: unknown) => void) | undefined;
  readonly #listener: Listener;
  readonly #connections = new Set<Socket>();
  #address: AddressInfo = { address: "", port: 0, family: "" };

  private constructor(sandbox: BaseSandbox, port: number, onError: ((error: unknown) => void) | undefined) {
    this.#sandbox = sandbox;
    this.#port = port;
    this.#onError = onError;
    this.#listener = createServer((connection) => void this.#accept(connection));
  }

  /** @internal Listens, and returns when the port accepts connections. */
  static async listen(sandbox: BaseSandbox, port: number, options?: ForwardOptions): Promise<Forward> {
    const { localPort = 0, host = "127.0.0.1", onError, signal } = checkOptions(options);
    checkInteger("port", port, 1, 65_535);
    checkInteger("localPort", localPort, 0, 65_535);
    checkString("host", host);
    checkCallbacks({ onError });
    signal?.throwIfAborted();
    sandbox._port(port);
    const forward = new Forward(sandbox, port, onError);
    const listener = forward.#listener;
    await new Promise<void>((resolve, reject) => {
      listener.once("error", reject).listen(localPort, host, () => {
        listener.off("error", reject);
        resolve();
      });
    });
    forward.#address = listener.address() as AddressInfo;
    const onAbort = () => void forward.close();
    signal?.addEventListener("abort", onAbort);
    listener.once("close", () => signal?.removeEventListener("abort", onAbort));
    return forward;
  }

  /** The port of this machine. */
  get localPort(): number {
    return this.#address.port;
  }

  /** HOST:PORT, for the URL of a client on this machine. */
  get address(): string {
    const { address, port, family } = this.#address;
    return family === "IPv6" ? `[${address}]:${port}` : `${address}:${port}`;
  }

  /** Stops listening, and ends the connections. */
  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#listener.close(() => resolve()));
    for (const connection of this.#connections) connection.destroy();
    await closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** Connects a TCP connection to a WebSocket. When one of them ends, the other one is closed. */
  async #accept(connection: Socket): Promise<void> {
    this.#connections.add(connection);
    connection.once("close", () => this.#connections.delete(connection));
    try {
      await this.#relay(connection);
    } catch (error) {
      connection.destroy();
      this.#onError?.(error);
    }
  }

  /** Opens a WebSocket to the port, and copies bytes in both directions until one of them ends. */
  async #relay(connection: Socket): Promise<void> {
    // Loaded here, because most programs forward no ports.
    const { WebSocket } = await import("ws");
    const { server, path } = this.#sandbox._port(this.#port);
    const { url, options } = server.webSocket(path);
    const socket = new WebSocket(url, {
      ...options,
      perMessageDeflate: false,
      handshakeTimeout: handshakeLimit,
      maxPayload: maxMessage,
    });
    let isOpen = false;
    await new Promise<void>((resolve, reject) => {
      socket.on("error", (error) => reject(server.webSocketError(error, isOpen)));
      socket.on("unexpected-response", (_, response) => {
        void server
          .webSocketRefusal(response)
          .then(reject, reject)
          .finally(() => socket.terminate());
      });
      connection.pause().on("error", reject);
      connection.once("close", () => {
        socket.terminate();
        resolve();
      });
      socket.on("open", () => {
        isOpen = true;
        connection.resume();
      });
      connection.on("data", (bytes) => {
        connection.pause();
        socket.send(bytes, (error) => (error ? reject(server.webSocketError(error, true)) : connection.resume()));
      });
      // A WebSocket cannot end only one of its directions.
      connection.once("end", () => socket.close());
      socket.on("message", (data: Buffer, isBinary) => {
        if (!isBinary) {
          reject(server.webSocketFailure(data.toString()));
          return;
        }
        if (connection.write(data)) return;
        socket.pause();
        connection.once("drain", () => socket.resume());
      });
      socket.on("close", () => connection.end());
    });
  }
}
