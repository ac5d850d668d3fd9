package rpc

// CodeInfo describes an error code in the documentation of the API: the OpenRPC document and docs/api.md.
type CodeInfo struct {
	Code Code
	// Name identifies the code to programs and in references within the OpenRPC document.
	Name string
	// Status lists the HTTP statuses of responses that consist of this error. A batch has status 200.
	Status []int
	// Meaning says what happened, and Remedy what the caller can do about it.
	Meaning, Remedy string
}

// Codes lists every error code.
var Codes = []CodeInfo{
	{CodeParse, "parse", []int{400}, "the body is not strict JSON", "fix the body; the message says where the error is"},
	{
		CodeInvalidRequest, "invalid_request", []int{400, 404, 405, 411, 412, 413, 415, 416, 426, 431},
		"not a JSON-RPC request, or a wrong path, HTTP method, size or `Content-Type`", "the message says which",
	},
	{CodeMethodNotFound, "method_not_found", []int{404}, "there is no such method", "see `rpc.discover`"},
	{
		CodeInvalidParams, "invalid_params", []int{400},
		"a param is missing, unknown, of the wrong type or out of range", "the message names it",
	},
	{
		CodeUnauthenticated, "unauthenticated", []int{401},
		"the key is missing, malformed, expired, revoked or unknown; the error is the same for all of these",
		"ask the administrator for a key",
	},
	{
		CodePermissionDenied, "permission_denied", []int{403},
		"the key is valid but limited to another namespace or to other methods", "the message names the required scope, or the key's namespaces; use another key",
	},
	{
		CodeNotFound, "not_found", []int{404}, "there is no such sandbox, or no such process or file in it",
		"the message says which; start the sandbox, or check the pid, the tag or the path",
	},
	{
		CodeConflict, "conflict", []int{409},
		"the sandbox runs with a different configuration, is starting, stopping or failed, or lacks its workdir; a process has ended, or has no input or terminal; or a file is of the wrong type, too large or not text, or the sandbox refuses the operation",
		"for a sandbox, use the same configuration, or stop it first; while it starts or stops, wait; after a failure, start it again; without its workdir, stop it and start it with another one; for a process or a file, the message says what is wrong",
	},
	{
		CodeExhausted, "exhausted", []int{429},
		"too many requests at once or per second, a quota or a limit was reached, the server has too little memory for a start, a run printed too much, or the disk of the server or of the sandbox is full",
		"wait as long as `Retry-After` says; if it is absent, trying again does not help: print less, remove files, ask for a smaller sandbox, or stop sandboxes",
	},
	{
		CodeRunTimeout, "run_timeout", []int{504},
		"the run reached its time limit and was interrupted; a REPL session keeps its state",
		"set a longer `timeout`, or do less work in a run; `error.data.output` has what the run printed",
	},
	{CodeCommandNotFound, "command_not_found", []int{422}, "the sandbox has no such program", "check its name and the image"},
	{
		CodeRunFailed, "run_failed", []int{502},
		"the run had begun, and failed in the sandbox or was lost, for example because the connection to the sandbox ended or the server stopped; it may have taken effect",
		"check what the run did before you send it again; the message may come from code in the sandbox",
	},
	{
		CodeCommandNotExecutable, "command_not_executable", []int{422},
		"the file exists in the sandbox but cannot be run: it is a directory, lacks the permission, or is for another architecture",
		"the message says why; for a script, use its interpreter as the command",
	},
	{
		CodeUnavailable, "unavailable", []int{503},
		"the server is starting or stopping, or the sandbox is not responding",
		"wait as long as `Retry-After` says and try again; if that persists, stop the sandbox and start it again",
	},
	{
		CodeInternal, "internal", []int{500},
		"an unexpected error; only the server's log has the cause",
		"give the administrator the request id in `error.data.request_id`",
	},
}
