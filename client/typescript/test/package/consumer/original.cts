// A program for the original SDK. It uses all of the original's features, and nothing else.

import {
  BaseSandbox,
  type Command,
  type CommandExecution,
  type Execution,
  type Metrics,
  NodeSandbox,
  PythonSandbox,
  SandboxOptions,
} from "microsandbox";

class Subclass extends PythonSandbox {
  override async getDefaultImage(): Promise<string> {
    return "custom";
  }

  static override async create(options?: SandboxOptions): Promise<Subclass> {
    return BaseSandbox.createBase(Subclass, options);
  }
}

async function main(): Promise<void> {
  const options: SandboxOptions = SandboxOptions.builder()
    .serverUrl(process.env.SERVER as string)
    .namespace("default")
    .name("my-env")
    .apiKey("msb_a")
    .image("microsandbox/python")
    .memory(1024)
    .cpus(2)
    .timeout(60)
    .build();
  const sandbox: PythonSandbox = await PythonSandbox.create(options);
  const name: string = sandbox.name;
  const url: string = sandbox.serverUrl;
  const key: string | undefined = sandbox.apiKey;
  const started: boolean = sandbox.isStarted;
  console.log(name, sandbox.namespace, url === process.env.SERVER, key, started);

  const execution: Execution = await sandbox.run("6 * 7", { timeout: 5 });
  const output: string = await execution.output();
  const error: string = await execution.error();
  console.log(output, error, execution.hasError(), execution.status, execution.language);

  const command: Command = sandbox.command;
  const ended: CommandExecution = await command.run("sh", ["-c", "echo hello; echo no >&2; exit 3"], 5);
  console.log(
    await ended.output(),
    await ended.error(),
    ended.exitCode,
    ended.success,
    ended.command,
    ended.args.length,
  );

  const metrics: Metrics = sandbox.metrics;
  const all = await metrics.all();
  const cpu: number | undefined = await metrics.cpu();
  console.log(all.name, all.running, all.cpu_usage, cpu, await metrics.memory(), await metrics.disk());
  console.log(await metrics.isRunning());
  await sandbox.stop();
  await sandbox.stop();

  const node = new NodeSandbox({ serverUrl: url, name: "node" });
  try {
    await node.run("1");
  } catch (e) {
    console.log(e instanceof Error && e.message);
  }
  await node.start(undefined, 1024, 2.0, 60);
  console.log(await node.getDefaultImage(), node.isStarted);
  await node.stop();

  const rest: SandboxOptions = SandboxOptions.builder()
    .serverUrl(url)
    .name("all")
    .volumes(["/a:/b"])
    .ports(["80:80"])
    .envs(["A=1"])
    .dependsOn(["my-env"])
    .workdir("/w")
    .shell("/bin/sh")
    .scripts({ start: "true" })
    .exec("true")
    .build();
  console.log((await Subclass.create(rest)) instanceof Subclass);
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
