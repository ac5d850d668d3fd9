package rpc

// CodeInfo is a code as descriptions of the API tell of it.
type CodeInfo struct {
	Code Code
	// Name is for programs, and for references within a description.
	Name string
	// Status is the HTTP statuses of answers with this error alone.
	Status []int
	// Meaning is what happened; Remedy, what the caller can do.
	Meaning, Remedy string
}

// Codes is every code.
var Codes = []CodeInfo{
	{CodeParse, "parse", []int{400}, "the body is not strict JSON", "the message says where; mend the body"},
	{
		CodeInvalidRequest, "invalid_request", []int{400, 404, 405, 413, 415, 431},
		"not a JSON-RPC request, or a wrong path, HTTP method, size or `Content-Type`", "the message says which",
	},
	{CodeMethodNotFound, "method_not_found", []int{404}, "there is no such method", "see `rpc.discover`"},
	{
		CodeInvalidParams, "invalid_params", []int{400},
		"a param is missing, unknown, of the wrong type or out of range", "the message names it",
	},
	{
		CodeUnauthenticated, "unauthenticated", []int{401},
		"no key, or one that is malformed, expired, revoked or unknown; the answer is the same for all", "ask the administrator for a key",
	},
	{
		CodePermissionDenied, "permission_denied", []int{403},
		"the key is good, but limited to another namespace or to other methods", "the message names both; use another key",
	},
	{CodeNotFound, "not_found", []int{404}, "there is no such sandbox", "start it"},
	{
		CodeConflict, "conflict", []int{409},
		"the sandbox runs with another configuration, or is starting, stopping or failed",
		"the message says what differs; stop it first, or start it again",
	},
	{
		CodeExhausted, "exhausted", []int{429},
		"too many requests at a time or a second, too many bad keys, a quota, or a run that printed too much",
		"wait as `Retry-After` says; without it, a run was interrupted: print less",
	},
	{
		CodeRunTimeout, "run_timeout", []int{504},
		"the run reached its time limit and was interrupted; the session goes on", "give a longer `timeout`, or less work",
	},
	{CodeCommandNotFound, "command_not_found", []int{422}, "the sandbox has no such program", "check its name and the image"},
	{
		CodeUnavailable, "unavailable", []int{503},
		"the server starts or stops, or the sandbox does not answer",
		"wait as `Retry-After` says and try again; then stop and start the sandbox",
	},
	{
		CodeInternal, "internal", []int{500},
		"unforeseen; the cause is in the server's log only", "tell the administrator the request id in `error.data.request_id`",
	},
}
