import { expect, test, vi } from "vitest";
import * as sdk from "../../src/index.js";
import { PythonSandbox } from "../../src/index.js";
import { type Reply, errorReply, Stub } from "../stub.js";

/** Returns the error of a run to which the server sends this reply. */
async function thrown(reply: Reply, apiKey?: string): Promise<sdk.MicrosandboxError> {
  await using stub = await Stub.start();
  const sandbox = await PythonSandbox.create({ serverUrl: stub.url, apiKey });
  stub.answer("sandbox.repl.run", reply);
  const error: unknown = await sandbox.run("1").catch((error: unknown) => error);
  expect(error).toBeInstanceOf(sdk.MicrosandboxError);
  expect(stub.called).toEqual(["sandbox.start", "sandbox.repl.run"]);
  return error as sdk.MicrosandboxError;
}

const badKey = "missing or invalid API key: check apiKey or MSB_API_KEY";

test.each<[number, number, typeof sdk.MicrosandboxError, string]>([
  [400, -32700, sdk.ParseError, "ParseError"],
  [400, -32600, sdk.InvalidRequestError, "InvalidRequestError"],
  [404, -32601, sdk.MethodNotFoundError, "MethodNotFoundError"],
  [400, -32602, sdk.InvalidParamsError, "InvalidParamsError"],
  [401, -32002, sdk.AuthenticationError, "AuthenticationError"],
  [404, -32003, sdk.SandboxNotFoundError, "SandboxNotFoundError"],
  [403, -32004, sdk.PermissionDeniedError, "PermissionDeniedError"],
  [409, -32005, sdk.ConflictError, "ConflictError"],
  [429, -32006, sdk.ResourceExhaustedError, "ResourceExhaustedError"],
  [504, -32007, sdk.RunTimeoutError, "RunTimeoutError"],
  [422, -32008, sdk.CommandNotFoundError, "CommandNotFoundError"],
  [502, -32010, sdk.RunFailedError, "RunFailedError"],
  [422, -32011, sdk.CommandNotExecutableError, "CommandNotExecutableError"],
  [503, -32009, sdk.UnavailableError, "UnavailableError"],
  [500, -32603, sdk.InternalError, "InternalError"],
  // Error codes of a newer server.
  [503, -32099, sdk.UnavailableError, "UnavailableError"],
  [418, -32099, sdk.UnexpectedAnswerError, "UnexpectedAnswerError"],
])("%i with %i is %o", async (status, code, kind, name) => {
  const error = await thrown(errorReply(status, code), "msb_a");
  const message = code === -32002 ? badKey : "it is so";
  expect(error.constructor).toBe(kind);
  expect(error.name).toBe(name);
  expect(String(error)).toBe(`${name}: ${message}`);
  expect(error.stack).toContain(`${name}: ${message}`);
  expect({ ...error }).toEqual({ code, status, requestId: "REQUEST-ID" });
});

test("Retry-After is in seconds", async () => {
  const retryAfter = async (header: string) =>
    (await thrown(errorReply(503, -32009, { "Retry-After": header }))).retryAfter;
  expect(await retryAfter("7")).toBe(7);
  const now = vi.spyOn(Date, "now").mockReturnValue(Date.parse("Thu, 01 Jan 2026 00:00:00 GMT"));
  expect(await retryAfter("Thu, 01 Jan 2026 00:01:00 GMT")).toBe(60);
  expect(await retryAfter("Wed, 31 Dec 2025 23:59:00 GMT")).toBe(0);
  now.mockRestore();
  expect(await retryAfter("soon")).toBeUndefined();
});

test("the message about a bad key says where the key comes from", async () => {
  expect((await thrown(errorReply(401, -32002))).message).toContain("pass apiKey, or set MSB_API_KEY");
  expect((await thrown(errorReply(401, -32002), "msb_a")).message).toBe(badKey);
});

const html = "<html>";
test.each<[string, Reply, typeof sdk.MicrosandboxError, string]>([
  ["a page", { status: 200, body: html }, sdk.UnexpectedAnswerError, "is not from msbd"],
  ["401", { status: 401, body: html }, sdk.AuthenticationError, "HTTP status 401"],
  ["403", { status: 403, body: html }, sdk.PermissionDeniedError, "HTTP status 403"],
  ["404", { status: 404, body: html }, sdk.UnexpectedAnswerError, "HTTP status 404"],
  ["429", { status: 429, body: html }, sdk.ResourceExhaustedError, "HTTP status 429"],
  ["502", { status: 502, body: html }, sdk.UnavailableError, "HTTP status 502"],
  ["503", { status: 503, body: html }, sdk.UnavailableError, "HTTP status 503"],
  ["504", { status: 504, body: html }, sdk.UnavailableError, "HTTP status 504"],
  ["JSON that is not an object", { status: 200, body: "[1]" }, sdk.UnexpectedAnswerError, "is not from msbd"],
  ["truncated JSON", { status: 200, body: '{"result":' }, sdk.UnexpectedAnswerError, "is not from msbd"],
  [
    "a result with an error status",
    { status: 500, body: '{"result":1}' },
    sdk.UnexpectedAnswerError,
    "HTTP status 500",
  ],
  ["nothing", { status: 204, body: "" }, sdk.UnexpectedAnswerError, "HTTP status 204"],
  [
    "plain http to TLS",
    { status: 400, body: "Client sent an HTTP request to an HTTPS server.\n" },
    sdk.UnexpectedAnswerError,
    "use https://",
  ],
])("a response that is not from msbd: %s", async (_, reply, kind, says) => {
  const error = await thrown(reply);
  expect(error.constructor).toBe(kind);
  expect(error.message).toContain(says);
  expect(error.status).toBe(reply.status);
  expect(error).not.toHaveProperty("code");
});

test("a redirect is not followed", async () => {
  await using other = await Stub.start();
  const error = await thrown({ status: 307, body: "", headers: { Location: `${other.url}/api/v1/rpc` } }, "msb_a");
  expect(error).toBeInstanceOf(sdk.UnexpectedAnswerError);
  expect(error.message).toContain(other.url);
  expect(other.connections).toBe(0);
});
