// What run() costs beside the same request made with fetch, in turns: p50, p99 and their ratio. The server is
// that of MSB_SERVER_URL, or else one in another process that answers at once, so that little but the client
// is measured. And the package's size.

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

/** Answers at once. */
function serve() {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const chunk of request) body += chunk;
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
    const params = { sandbox: sandbox.name, language: "python", code: "1 + 1" };
    const body = JSON.stringify({ jsonrpc: "2.0", method: "sandbox.repl.run", params, id: 1 });
    const headers = { "Content-Type": "application/json", Authorization: `Bearer ${apiKey}` };
    /** @type {Record<string, () => Promise<unknown>>} */
    const ways = {
      "run()": async () => (await sandbox.run("1 + 1")).stdout,
      fetch: async () => {
        const answer = await fetch(`${serverUrl}/api/v1/rpc`, { method: "POST", headers, body });
        return /** @type {any} */ (await answer.json()).result.output[0].text;
      },
    };
    /** @type {Record<string, number[]>} */
    const times = { "run()": [], fetch: [] };
    for (let round = -warmUp; round < rounds; round++) {
      for (const [name, way] of Object.entries(ways)) {
        const start = process.hrtime.bigint();
        const text = await way();
        const time = Number(process.hrtime.bigint() - start) / 1000;
        if (text !== "2") throw new Error(`${name} gave ${text}`);
        if (round >= 0) times[name]?.push(time);
      }
    }
    const [ours, theirs] = Object.values(times).map((values) => {
      values.sort((a, b) => a - b);
      return [0.5, 0.99].map((q) => values[Math.floor(values.length * q)] ?? 0);
    });
    ["p50", "p99"].forEach((name, i) => {
      const [a, b] = [ours?.[i] ?? 0, theirs?.[i] ?? 0];
      console.log(
        `run() ${name} ${a.toFixed(0)} µs, fetch ${b.toFixed(0)} µs, ratio ${(a / b).toFixed(2)} (n=${rounds} each)`,
      );
    });
  } finally {
    await sandbox.stop();
  }
}

function size() {
  const [{ size, unpackedSize }] = JSON.parse(
    execFileSync("npm", ["pack", "--json", "--dry-run", "--ignore-scripts", "--silent"], { encoding: "utf8" }),
  );
  console.log(
    `package ${(size / 1024).toFixed(1)} KiB, unpacked ${(unpackedSize / 1024).toFixed(1)} KiB, no dependencies`,
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
