/**
 * Run untrusted code in microVMs, on an msbd server.
 *
 *     import { PythonSandbox } from "microsandbox";
 *
 *     await using sandbox = await PythonSandbox.create({ name: "my-sandbox" });
 *     const execution = await sandbox.run("6 * 7");
 *     console.log(execution.stdout);
 */

export { Command } from "./command.js";
export { type Context, type ContextOptions, Contexts } from "./contexts.js";
export {
  type AnyExecution,
  AuthenticationError,
  CodeError,
  CommandExitError,
  CommandNotExecutableError,
  CommandNotFoundError,
  ConfigError,
  ConflictError,
  ConnectionLostError,
  type ErrorDetails,
  InternalError,
  InvalidParamsError,
  InvalidRequestError,
  MethodNotFoundError,
  MicrosandboxError,
  NotStartedError,
  ParseError,
  PermissionDeniedError,
  RequestTimeoutError,
  ResourceExhaustedError,
  RunFailedError,
  RunTimeoutError,
  SandboxNotFoundError,
  ServerUnreachableError,
  UnavailableError,
  UnexpectedAnswerError,
} from "./errors.js";
export { CommandExecution, type ExceptionData, Execution, type OutputData } from "./execution.js";
export {
  type FileChange,
  type FileInfo,
  Files,
  type ReadOptions,
  type TransferOptions,
  type UploadOptions,
  Watcher,
  type WriteOptions,
} from "./files.js";
export { Forward, type ForwardOptions } from "./forward.js";
export { type ListOptions, listSandboxes, type SandboxInfo, type SandboxState } from "./list.js";
export { Metrics, type SandboxMetrics } from "./metrics.js";
export { NodeSandbox } from "./node-sandbox.js";
export {
  type CallOptions,
  type CodeOptions,
  type CommandOptions,
  type Envs,
  type OutputCallback,
  type ProgramOptions,
  type RunOptions,
  SandboxOptions,
  type SandboxOptionsBuilder,
  type ServerOptions,
  type StartOptions,
} from "./options.js";
export type { OutputLine, OutputPiece, PieceData } from "./output.js";
export {
  Process,
  Processes,
  ProcessExecution,
  type ProcessExit,
  type ProcessInfo,
  type ProcessOptions,
  type ProcessOutputOptions,
  type SignalOptions,
  type WaitOptions,
} from "./process.js";
export { Pty, type PtyOptions, PtyProcess } from "./pty.js";
export { PythonSandbox } from "./python-sandbox.js";
export { Result, type ResultData } from "./result.js";
export { BaseSandbox } from "./sandbox.js";
