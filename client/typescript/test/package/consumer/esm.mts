import * as sdk from "microsandbox";
import { NodeSandbox, PythonSandbox, RunTimeoutError, type SandboxMetrics, type SandboxOptions } from "microsandbox";

const options: SandboxOptions = { name: "my-env", envs: { A: "1" }, volumes: [], workdir: undefined };
{
  await using sandbox = await PythonSandbox.create(options);
  const { signal } = new AbortController();
  const { stdout, lines } = await sandbox.run("6 * 7", { timeout: 5, signal });
  const { exitCode } = await sandbox.command.run("sh", [], { timeout: 5, signal });
  const metrics: SandboxMetrics = await sandbox.metrics.all({ signal });
  console.log(stdout, lines.length, exitCode, metrics.memory_usage);
}
const error = await new NodeSandbox().run("1").catch((error: unknown) => error);
console.log((error as sdk.MicrosandboxError).name, error instanceof RunTimeoutError);
// @ts-expect-error: the elements of a list must be strings
void (() => new PythonSandbox({ envs: [1] }));
// @ts-expect-error: the option does not exist
void (() => new PythonSandbox({ nam: "a" }));
console.log(Object.keys(sdk).sort().join(" "));
