// Measures run() against the same request made with fetch, alternating: p50, p99 and their ratio; then the same for a run
// with callbacks and its stream of events. Also prints the size of the package. The server is the one at MSB_SERVER_URL. Without that, it is a stub in another process that
// answers immediately, so that mostly the client is measured.

import { execFileSync, fork } from "node:child_process";
import { createServer } from "node:http";
import { PythonSandbox } from "../dist/esm/index.js";

const rounds = 3000;
const warmUp = 300;

/** @type {Record<string, unknown>} */
const results = {
  "sandbox.start": "Sandbox bench started successfully",
  "sandbox.repl.run": { status: "success", language: "python", output: [{ stream: "stdout", text: "2" }] },
  "sandbox.stop": "Sandbox bench stopped successfully",
};

/** The events of the run; a server without a sandbox sends them as they are. */
const stream = [
  `event: output\ndata: ${JSON.stringify({ stream: "stdout", text: "2\n" })}\n\n`,
  `event: result\ndata: ${JSON.stringify({ status: "success", language: "python", output: [], exit_code: 0 })}\n\n`,
];

/** Serves fixed responses. */
function serve() {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const chunk of request) body += chunk;
    if (request.headers.accept === "text/event-stream") {
      response.setHeader("Content-Type", "text/event-stream");
      for (const event of stream) response.write(event);
      response.end();
      return;
    }
    const result = results[JSON.parse(body).method];
    response.setHeader("Content-Type", "application/json").end(JSON.stringify({ jsonrpc: "2.0", result, id: 1 }));
  });
  server.listen(0, "127.0.0.1", () => process.send?.(server.address()));
}

/**
 * @param {string} serverUrl
 * @param {string | undefined} apiKey
 */
async function measure(serverUrl, apiKey) {
  const sandbox = await PythonSandbox.create({ serverUrl, apiKey });
  try {
    const params = { sandbox: sandbox.name, language: "python", code: "print(1 + 1)", results: true };
    const body = JSON.stringify({ jsonrpc: "2.0", method: "sandbox.repl.run", params, id: 1 });
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${apiKey}` };
    /** @param {Record<string, string>} more */
    const post = (more) => fetch(`${serverUrl}/api/v1/rpc`, { method: "POST", headers: { ...headers, ...more }, body });
    await compare("run()", {
      "run()": async () => (await sandbox.run("print(1 + 1)")).stdout,
      fetch: async () => /** @type {any} */ (await (await post({})).json()).result.output[0].text,
    });
    await compare("run() with onStdout", {
      "run()": async () => {
        let text = "";
        await sandbox.run("print(1 + 1)", { onStdout: (piece) => (text += piece) });
        return text.trim();
      },
      fetch: async () => {
        const response = await post({ Accept: "text/event-stream" });
        const [, data = "{}"] = /^data: (.*)$/m.exec(await response.text()) ?? [];
        return JSON.parse(data).text.trim();
      },
    });
  } finally {
    await sandbox.stop();
  }
}

/**
 * Calls the two clients in turn, and prints their times.
 *
 * @param {string} title
 * @param {Record<string, () => Promise<string>>} clients
 */
async function compare(title, clients) {
  /** @type {Record<string, number[]>} */
  const times = { "run()": [], fetch: [] };
  for (let round = -warmUp; round < rounds; round++) {
    for (const [name, client] of Object.entries(clients)) {
      const start = process.hrtime.bigint();
      const text = await client();
      const time = Number(process.hrtime.bigint() - start) / 1000;
      if (text !== "2") throw new Error(`${name} returned ${text}`);
      if (round >= 0) times[name]?.push(time);
    }
  }
  const [runTimes, fetchTimes] = Object.values(times).map((values) => {
    values.sort((a, b) => a - b);
    return [0.5, 0.99].map((q) => values[Math.floor(values.length * q)] ?? 0);
  });
  ["p50", "p99"].forEach((name, i) => {
    const [a, b] = [runTimes?.[i] ?? 0, fetchTimes?.[i] ?? 0];
    console.log(
      `${title} ${name} ${a.toFixed(0)} µs, fetch ${b.toFixed(0)} µs, ratio ${(a / b).toFixed(2)} (n=${rounds} each)`,
    );
  });
}

function size() {
  const [{ size, unpackedSize }] = JSON.parse(
    execFileSync("npm", ["pack", "--json", "--dry-run", "--ignore-scripts", "--silent"], { encoding: "utf8" }),
  );
  console.log(
    `package ${(size / 1024).toFixed(1)} KiB, unpacked ${(unpackedSize / 1024).toFixed(1)} KiB, 1 dependency (ws)`,
  );
}

if (process.argv[2] === "serve") {
  serve();
} else if (process.env.MSB_SERVER_URL) {
  await measure(process.env.MSB_SERVER_URL, process.env.MSB_API_KEY);
  size();
} else {
  const server = fork(new URL(import.meta.url), ["serve"]);
  const { port } = await new Promise((resolve) => server.once("message", resolve));
  await measure(`http://127.0.0.1:${port}`, "msb_bench").finally(() => server.kill());
  size();
}
