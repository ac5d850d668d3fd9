import { readFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { PythonSandbox } from "../../src/index.js";
import { Consumer } from "../consumer.js";
import { access } from "./server.js";

const text = readFileSync(new URL("../../README.md", import.meta.url), "utf8");
const blocks = [...text.matchAll(/^```typescript\n(.*?)^```$/gms)].map(([, block = ""]) => block);

let consumer: Consumer;

beforeAll(async () => {
  consumer = await Consumer.install();
  blocks.forEach((block, i) => {
    consumer.write(`block${i}.mts`, block.replace("your-api-key-here", access.apiKey));
  });
  const args = ["--strict", "--target", "es2022", "--module", "nodenext", "--types", "node"];
  const programs = blocks.map((_, i) => `block${i}.mts`);
  expect(await consumer.tsc(...args, ...programs)).toMatchObject({ stdout: "", code: 0 });
});

afterAll(async () => {
  // The blocks about keys start this sandbox without stopping it.
  await (await PythonSandbox.create({ ...access, name: "my-sandbox" })).stop();
  consumer?.[Symbol.dispose]();
});

test.each(blocks.map((block, i) => [i, block]))("block %i runs unchanged", async (i, block) => {
  const env: Record<string, string> = { MSB_SERVER_URL: access.serverUrl };
  if (!block.includes("your-api-key-here")) env.MSB_API_KEY = access.apiKey;
  const { stdout, stderr, code } = await consumer.node(`block${i}.mjs`, [], env);
  expect({ stderr, code }).toEqual({ stderr: "", code: 0 });
  // A comment after console.log shows what it must print.
  const expected = [...block.matchAll(/console\.log\(.*\); \/\/ (.*)$/gm)].map(([, printed]) => printed);
  for (const printed of expected) expect(stdout.split("\n")).toContain(printed);
});
