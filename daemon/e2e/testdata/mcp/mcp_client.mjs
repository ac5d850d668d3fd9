// Tests a server with the TypeScript client of MCP, over HTTP and over stdio through the bridge "msb mcp".
import assert from "node:assert/strict";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { StreamableHTTPClientTransport } from "@modelcontextprotocol/sdk/client/streamableHttp.js";

const { MSB, MSB_SERVER_URL, MSB_API_KEY, LIMITED_KEY, SANDBOX: sandbox } = process.env;
let checks = 0;

function check(got, want) {
  checks++;
  assert.deepEqual(got, want);
}

function http(key) {
  return new StreamableHTTPClientTransport(new URL(MSB_SERVER_URL + "/mcp"), { requestInit: { headers: key ? { Authorization: `Bearer ${key}` } : {} } });
}

function stdio(key) {
  return new StdioClientTransport({ command: MSB, args: ["mcp"], env: { ...process.env, MSB_API_KEY: key } });
}

async function connect(transport) {
  const client = new Client({ name: "e2e", version: "1" });
  await client.connect(transport);
  return client;
}

for (const transport of [http(MSB_API_KEY), stdio(MSB_API_KEY)]) {
  const client = await connect(transport);
  check(client.getServerVersion().name, "msbd");
  const { tools } = await client.listTools();
  const names = ["get", "get_metrics", "get_process_output", "list", "list_files", "list_processes", "read_file", "remove_file", "run_code", "run_command"];
  names.push("send_process_input", "start", "start_process", "stop", "stop_process", "write_file");
  check(tools.map((tool) => tool.name).sort(), names.map((name) => "sandbox_" + name));
  check(tools.find((tool) => tool.name === "sandbox_get_metrics").annotations.readOnlyHint, true);

  const call = (name, args, options) => client.callTool({ name, arguments: args }, undefined, options);
  const text = 'naïve "ключ" 沙箱 🏖 \\ \u2028 end';
  let result = await call("sandbox_run_code", { sandbox, language: "python", code: `print(${JSON.stringify(text)})` });
  check([result.isError ?? false, result.content], [false, [{ type: "text", text }]]);
  check(result._meta["io.github.msbd/result"], { status: "success" });
  result = await call("sandbox_run_command", { sandbox, command: "false" });
  check([result.content[0].text, result._meta["io.github.msbd/result"].exit_code], ["(exit code 1)", 1]);
  result = await call("sandbox_start", { sandbox, config: { image: "microsandbox/python" } });
  check(result.structuredContent, { result: `Sandbox ${sandbox} started successfully` });
  result = await call("sandbox_get", { sandbox });
  check([result.structuredContent.state, result.structuredContent.image], ["running", "microsandbox/python"]);
  result = await call("sandbox_list", {});
  check(result.structuredContent.sandboxes.some((listed) => listed.name === sandbox), true);
  result = await call("sandbox_get_metrics", { sandbox });
  check(result.structuredContent.sandboxes[0].running, true);
  const path = "/tmp/mcp/naïve file.txt";
  result = await call("sandbox_write_file", { sandbox, path, content: text });
  check(result.structuredContent.path, path);
  result = await call("sandbox_read_file", { sandbox, path });
  check(result.content, [{ type: "text", text }]);
  const { structuredContent: process } = await call("sandbox_start_process", { sandbox, command: "echo", args: ["from the background"] });
  result = await call("sandbox_get_process_output", { sandbox, pid: process.pid, wait: 60 });
  check(result.content.map((content) => content.text), ["from the background\n", "(exit code 0)"]);
  const png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=";
  const code = `import base64\nclass Dot:\n  def _repr_png_(self): return base64.b64decode("${png}")\nDot()`;
  result = await call("sandbox_run_code", { sandbox, language: "python", code });
  check(result.content[1], { type: "image", mimeType: "image/png", data: png });
  result = await call("sandbox_run_command", { sandbox, command: "seq", args: ["20000"] });
  const link = result.content[1];
  const { contents } = await client.readResource({ uri: link.uri });
  const complete = Array.from({ length: 20000 }, (_, i) => `${i + 1}\n`).join("");
  check([link.type, link.size, contents.length, contents[0].text], ["resource_link", complete.length, 1, complete]);
  result = await call("sandbox_stop", { sandbox: "none-such" });
  check([result.isError, result._meta["io.github.msbd/error"].code], [true, -32003]);
  await assert.rejects(call("no_such_tool", {}), /unknown tool/);
  const prompt = await client.getPrompt({ name: "create_node_sandbox", arguments: { sandbox_name: "my-node" } });
  check(prompt.messages[0].content.text.includes('"my-node"'), true);

  const progress = [];
  result = await call("sandbox_run_code", { sandbox, language: "python", code: "import time" }, { onprogress: (p) => progress.push(p.progress) });
  check([result.content[0].text, progress.length >= 1], ["(no output)", true]);

  // Aborting a call interrupts its run. Otherwise the next run would wait for it until after the timeout.
  const controller = new AbortController();
  const run = assert.rejects(call("sandbox_run_code", { sandbox, language: "python", code: "open('/tmp/began', 'w').close(); time.sleep(600)" }, { signal: controller.signal }));
  const began = () => call("sandbox_run_command", { sandbox, command: "rm", args: ["/tmp/began"] });
  while (!(await began())._meta["io.github.msbd/result"].success);
  controller.abort();
  await run;
  result = await call("sandbox_run_code", { sandbox, language: "python", code: "2+2" }, { timeout: 120_000 });
  check(result.content[0].text, "4");
  await client.close();
}

const limited = await connect(http(LIMITED_KEY));
const denied = await limited.callTool({ name: "sandbox_stop", arguments: { sandbox, namespace: "default" } });
check([denied.isError, denied._meta["io.github.msbd/error"].code], [true, -32004]);
await limited.close();
for (const transport of [http(""), http("msb_wrong"), stdio("msb_wrong")]) {
  await assert.rejects(connect(transport));
  checks++;
}
console.log(`@modelcontextprotocol/sdk: ${checks} checks`);
