import type { AddressInfo, Socket } from "node:net";
import { connect } from "node:net";
import { afterEach, beforeEach, expect, test } from "vitest";
import { type WebSocket, WebSocketServer } from "ws";
import { AuthenticationError, PythonSandbox, SandboxNotFoundError, ServerUnreachableError } from "../../src/index.js";
import { Stub, testKey } from "../stub.js";

let stub: Stub;
let sandbox: PythonSandbox;
/** What the stub does with a WebSocket. */
let onSocket: (socket: WebSocket) => void;
/** The status and the body with which the stub refuses handshakes. */
let refusal: { status: number; body: string } | undefined;
const handshakes: { url: string | undefined; key: string | undefined }[] = [];

beforeEach(async () => {
  stub = await Stub.start();
  handshakes.length = 0;
  refusal = undefined;
  onSocket = (socket) => socket.on("message", (data) => socket.send(data));
  const sockets = new WebSocketServer({ noServer: true });
  stub.http.on("upgrade", (request, socket, head) => {
    handshakes.push({ url: request.url, key: request.headers.authorization });
    if (refusal) {
      const { status, body } = refusal;
      const headers = `Content-Type: application/json\r\nContent-Length: ${body.length}\r\nConnection: close`;
      socket.end(`HTTP/1.1 ${status} Refused\r\n${headers}\r\n\r\n${body}`);
      return;
    }
    sockets.handleUpgrade(request, socket as Socket, head, (socket) => onSocket(socket));
  });
  sandbox = await PythonSandbox.create({ ...stub.access, name: "my-env", namespace: "team" });
});

afterEach(() => stub[Symbol.asyncDispose]());

/** Sends text over a new connection, and returns what comes back until the connection ends. */
async function exchange(port: number, text: string): Promise<string> {
  const connection = connect(port, "127.0.0.1", () => connection.write(text));
  let received = "";
  connection.on("data", (data) => (received += data)).on("error", () => {});
  await new Promise((resolve) => connection.once("close", resolve));
  return received;
}

test("each connection is a WebSocket, and bytes pass in both directions", async () => {
  onSocket = (socket) => {
    let received = "";
    socket.on("message", (data) => {
      received += data;
      if (!received.endsWith("\n")) return;
      socket.send(Buffer.from(received));
      socket.close(1000);
    });
  };
  await using forward = await sandbox.forward(8000);
  expect(forward.address).toBe(`127.0.0.1:${forward.localPort}`);
  const texts = ["a\n", `${"b".repeat(3_000_000)}\n`];
  expect(await Promise.all(texts.map((text) => exchange(forward.localPort, text)))).toEqual(texts);
  const url = "/api/v1/sandboxes/my-env/ports/8000?namespace=team";
  expect(handshakes).toEqual(Array(2).fill({ url, key: `Bearer ${testKey}` }));
});

test("the end of a connection ends its WebSocket", async () => {
  let ended = () => {};
  const closed = new Promise<void>((resolve) => (ended = resolve));
  onSocket = (socket) => socket.on("close", ended);
  await using forward = await sandbox.forward(8000);
  const connection = connect(forward.localPort, "127.0.0.1", () => connection.end("bye"));
  await closed;
});

test("errors are reported, and never sent to the connection", async () => {
  const errors: unknown[] = [];
  await using forward = await sandbox.forward(8000, { onError: (error) => errors.push(error) });
  const body = (code: number) => JSON.stringify({ error: { code, message: "it is so" } });
  refusal = { status: 404, body: body(-32003) };
  expect(await exchange(forward.localPort, "a")).toBe("");
  refusal = { status: 401, body: body(-32002) };
  expect(await exchange(forward.localPort, "a")).toBe("");
  refusal = undefined;
  onSocket = (socket) => {
    socket.send(body(-32002));
    socket.close(1008);
  };
  expect(await exchange(forward.localPort, "a")).toBe("");
  const kinds = [SandboxNotFoundError, AuthenticationError, AuthenticationError];
  expect(errors.map((error) => (error as object).constructor)).toEqual(kinds);
});

test("a server that cannot be reached is reported", async () => {
  const other = await Stub.start();
  const lonely = await PythonSandbox.create(other.access);
  await other[Symbol.asyncDispose]();
  let report = (_: unknown) => {};
  const reported = new Promise<unknown>((resolve) => (report = resolve));
  await using forward = await lonely.forward(8000, { onError: (error) => report(error) });
  await exchange(forward.localPort, "a");
  expect(await reported).toBeInstanceOf(ServerUnreachableError);
});

test("close and a signal end the connections and free the port", async () => {
  for (const end of ["close", "signal"]) {
    let opened = () => {};
    const open = new Promise<void>((resolve) => (opened = resolve));
    onSocket = () => opened();
    const controller = new AbortController();
    const forward = await sandbox.forward(8000, { signal: controller.signal });
    const exchanged = exchange(forward.localPort, "a");
    await open;
    if (end === "close") await forward.close();
    else controller.abort();
    expect(await exchanged).toBe("");
    await using again = await sandbox.forward(8000, { localPort: forward.localPort });
    expect(again.localPort).toBe(forward.localPort);
  }
  const { port } = stub.http.address() as AddressInfo;
  await expect(sandbox.forward(8000, { localPort: port })).rejects.toThrow("EADDRINUSE");
});
