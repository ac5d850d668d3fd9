import { expect, test } from "vitest";
import { CommandExecution, Execution, type OutputLine } from "../../src/index.js";

const output: OutputLine[] = [
  { stream: "stdout", text: "  first" },
  { stream: "stderr", text: " no" },
  { stream: "stdout", text: "" },
  { stream: "stdout", text: "second " },
  { stream: "stdout", text: "" },
];

test("an execution contains the output", async () => {
  const execution = new Execution({ status: "success", language: "python", output });
  expect(execution.status).toBe("success");
  expect(execution.language).toBe("python");
  expect(execution.lines).toEqual(output);
  expect(execution.stdout).toBe("  first\n\nsecond");
  expect(execution.stderr).toBe(" no");
  expect(execution.text).toBe("  first\n no\n\nsecond");
  expect(`${execution}`).toBe(execution.text);
  expect(await execution.output()).toBe("first\n\nsecond");
  expect(await execution.error()).toBe("no");
});

test.each<[boolean, string, OutputLine[]]>([
  [false, "success", [{ stream: "stdout", text: "error" }]],
  [false, "success", [{ stream: "stderr", text: "" }]],
  [true, "success", [{ stream: "stderr", text: "warning" }]],
  [true, "error", []],
])("hasError is %s for %s with %j", (has, status, output) => {
  expect(new Execution({ status, output }).hasError()).toBe(has);
});

test("a command execution contains the exit code", async () => {
  const execution = new CommandExecution({ command: "ls", args: ["-l"], exit_code: 2, success: false, output });
  expect(execution.command).toBe("ls");
  expect(execution.args).toEqual(["-l"]);
  expect(execution.exitCode).toBe(2);
  expect(execution.success).toBe(false);
  expect(await execution.output()).toBe("first\n\nsecond");
  expect(await execution.error()).toBe("no");
});

test("unknown values are the same as in the original", async () => {
  const code = new Execution();
  expect([code.status, code.language, await code.output(), code.hasError()]).toEqual(["unknown", "unknown", "", false]);
  const { command, args, exitCode, success } = new CommandExecution();
  expect([command, args, exitCode, success]).toEqual(["", [], -1, false]);
});
