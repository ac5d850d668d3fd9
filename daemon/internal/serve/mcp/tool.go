package mcp

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/go-json-experiment/json/jsontext"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
)

// tool describes an MCP tool that calls a JSON-RPC method.
type tool struct {
	name string
	// method is the method whose params are the arguments of the tool. run may call other methods as well.
	method             string
	title, description string
	hints              sdk.ToolAnnotations
	// needsSandbox means that the method fails with rpc.CodeNotFound only if the sandbox does not exist, so that the model should
	// start it.
	needsSandbox bool
	// omit are params of the method that models do not need, and numbers are arguments that the method does not have. require
	// are optional params that the tool requires.
	omit, require []string
	numbers       []number
	// text returns the result of the method as text for people and models. The result itself is structured content. It is nil for
	// a tool that has run.
	text func(result jsontext.Value) string
	// run calls the method and returns a result without structured content. With an error, its result is more content for the
	// model, or nil.
	run func(*call) (*sdk.CallToolResult, *rpc.Error)
}

// nameRule says what the name of a sandbox may be.
const nameRule = "1 to 63 of A-Z a-z 0-9 _ -, beginning with a letter or a digit"

const inNamespace = " If namespace is omitted, the API key's own namespace is used, or \"default\" if the key is not limited to exactly one."

const allNamespaces = "The namespace * stands for all namespaces that the key may use."

const states = "The state is starting, running, stopping or failed; reason says why a sandbox failed."

// readOnly are the hints of a tool that changes nothing.
var readOnly = sdk.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true, OpenWorldHint: new(false)}

var aboutOutput = fmt.Sprintf(" If the output has more than %s bytes (%d unless you set it, at most %d), you get its beginning and its end, "+
	"and the path of a file in the sandbox that has all of it.", maxOutput.name, maxOutput.otherwise, maxOutput.max)

const ofProcess = " Name the process by its pid, or by the tag that it was started with."

var tools = []tool{
	{
		name: "sandbox_start", method: rpc.MethodSandboxStart, title: "Start a sandbox",
		description: "Start a sandbox, an isolated microVM, with a name of your choice: " + nameRule + ". " +
			"config.image is microsandbox/python or microsandbox/node, config.memory is in MiB, config.cpus is the number of processors, " +
			"config.disk is the size of the writable disk in MiB, config.envs is a list of NAME=value, config.workdir is the absolute path of the " +
			"directory in which runs start, which is created, config.user is the user that everything runs as, and config.hostname is the name " +
			"that the sandbox has for its programs. " +
			"Starting a sandbox that already runs with the same config changes nothing." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(false), IdempotentHint: true, OpenWorldHint: new(false)},
		text:  stringText,
	},
	{
		name: "sandbox_stop", method: rpc.MethodSandboxStop, title: "Stop a sandbox",
		description: "Stop a sandbox. Its files and everything that its code defined are deleted." + inNamespace,
		hints:       sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(false)},
		text:        stringText,
	},
	{
		name: "sandbox_run_code", method: rpc.MethodSandboxReplRun, needsSandbox: true, title: "Run code in a sandbox",
		description: "Run code in a running sandbox. language is python, node or bash. Later runs can use what the code defines. If the code ends with " +
			"an expression, its value is printed. Figures of matplotlib and other images that the code shows are in the result. timeout is in seconds." + aboutOutput + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		omit:  []string{"encoding", "results", "context", "run_id"}, require: []string{"language"}, numbers: []number{maxOutput}, run: runCode,
	},
	{
		name: "sandbox_run_command", method: rpc.MethodSandboxCommandRun, needsSandbox: true, title: "Run a command in a sandbox",
		description: "Run a program in a running sandbox. args are passed to it unchanged, without a shell. For shell syntax, run the command sh " +
			"with the args -c and the command line. timeout is in seconds." + aboutOutput + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		omit:  []string{"encoding"}, numbers: []number{maxOutput}, run: runCommand,
	},
	{
		name: "sandbox_list", method: rpc.MethodSandboxList, title: "List the sandboxes",
		description: "List the sandboxes with their state, image and size. " + states + " Memory and disk are in MiB. " + allNamespaces +
			" If the result has a next, call the tool again with it as after to get more." + inNamespace,
		hints: readOnly, text: jsonText,
	},
	{
		name: "sandbox_get", method: rpc.MethodSandboxGet, needsSandbox: true, title: "Get a sandbox",
		description: "Get the state, image and size of a sandbox. " + states + " Memory and disk are in MiB." + inNamespace,
		hints:       readOnly, text: jsonText,
	},
	{
		name: "sandbox_get_metrics", method: rpc.MethodSandboxMetricsGet, needsSandbox: true, title: "Get sandbox metrics",
		description: "List the sandboxes with their state and what each uses: cpu_usage in percent of one processor, memory_usage in MiB, " +
			"disk_usage in bytes. " + states + " Set sandbox to get only that one. " + allNamespaces + inNamespace,
		hints: readOnly, text: jsonText,
	},
	{
		name: "sandbox_read_file", method: rpc.MethodFSRead, title: "Read a file in a sandbox",
		description: fmt.Sprintf("Read a text file, or a part of it: up to length bytes (%d unless you set it, at most %d) from the byte offset. "+
			"Images (PNG, JPEG, GIF, WebP) are shown.", fileLength.otherwise, fileLength.max) + inNamespace,
		hints: readOnly, omit: []string{"encoding"}, numbers: []number{fileLength}, run: readFile,
	},
	{
		name: "sandbox_write_file", method: rpc.MethodFSWrite, title: "Write a file in a sandbox",
		description: "Write a text file, or replace it. Missing directories are created. mode has the permissions in octal, such as 0755." + inNamespace,
		hints:       sdk.ToolAnnotations{DestructiveHint: new(true), IdempotentHint: true, OpenWorldHint: new(false)},
		omit:        []string{"encoding"}, text: jsonText,
	},
	{
		name: "sandbox_list_files", method: rpc.MethodFSList, title: "List files in a sandbox",
		description: "List a directory, down to depth levels (1 unless you set it)." + inNamespace,
		hints:       readOnly, run: listFiles,
	},
	{
		name: "sandbox_remove_file", method: rpc.MethodFSRemove, title: "Remove a file in a sandbox",
		description: "Remove a file or an empty directory, or with recursive any directory." + inNamespace,
		hints:       sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(false)},
		text:        doneText,
	},
	{
		name: "sandbox_start_process", method: rpc.MethodProcessStart, title: "Start a background process in a sandbox",
		description: "Start a program in the background, such as a server or a long job, and get its pid. args are passed to it unchanged, " +
			"without a shell. tag is a name of your choice. Set open_stdin to send it input later. timeout is in seconds; without it, there is no " +
			"time limit." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		omit:  []string{"encoding", "terminal"}, text: jsonText,
	},
	{
		name: "sandbox_list_processes", method: rpc.MethodProcessList, title: "List the background processes of a sandbox",
		description: "List the background processes that run, and those that have ended." + inNamespace,
		hints:       readOnly, run: listProcesses,
	},
	{
		name: "sandbox_get_process_output", method: rpc.MethodProcessLogs, title: "Get the output of a background process",
		description: fmt.Sprintf("Get what a background process has printed from the byte offset on, up to %s bytes (%d unless you set it), and whether it "+
			"runs. Without offset, you get the newest output. To poll, pass the offset that the previous result names. wait is how many seconds (at most %d) to "+
			"wait for its end first.", maxOutput.name, maxOutput.otherwise, waitFor.max) + ofProcess + inNamespace,
		hints: readOnly, omit: []string{"encoding"}, numbers: []number{position, maxOutput, waitFor}, run: readOutput,
	},
	{
		name: "sandbox_send_process_input", method: rpc.MethodProcessInput, title: "Send input to a background process",
		description: "Write data to the standard input of a background process that was started with open_stdin. close ends its input." + ofProcess + inNamespace,
		hints:       sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		omit:        []string{"encoding"}, text: doneText,
	},
	{
		name: "sandbox_stop_process", method: rpc.MethodProcessSignal, title: "Stop a background process",
		description: fmt.Sprintf("End a background process and everything that it started: with SIGTERM, and after %d seconds with SIGKILL.", stopSeconds) +
			ofProcess + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), IdempotentHint: true, OpenWorldHint: new(false)},
		omit:  []string{"signal", "all"}, run: stopProcess,
	},
}

func isObject(schema jsontext.Value) bool {
	var s struct {
		Type any `json:"type"`
	}
	return json.Unmarshal(schema, &s) == nil && s.Type == "object"
}

func (t *tool) describe(params, result jsontext.Value) *sdk.Tool {
	d := &sdk.Tool{
		Name: t.name, Title: t.title, Description: t.description, Annotations: &t.hints, InputSchema: t.inputSchema(params),
	}
	switch {
	case t.text == nil: // the result is only text and images
	case isObject(result):
		d.OutputSchema = json.RawMessage(result)
	default:
		d.OutputSchema = map[string]any{"type": "object", "properties": map[string]any{resultKey: json.RawMessage(result)}, "required": []string{resultKey}}
	}
	return d
}

// inputSchema returns the schema of the tool's arguments. It is the schema of the method's params, without those that models do
// not need, and without the members of config that the method always refuses, because models would use them.
func (t *tool) inputSchema(params jsontext.Value) any {
	schema := decode[map[string]any](params)
	properties := schema["properties"].(map[string]any)
	required, _ := schema["required"].([]any)
	for _, name := range t.omit {
		delete(properties, name)
	}
	required = slices.DeleteFunc(required, func(name any) bool { return slices.Contains(t.omit, name.(string)) })
	for _, name := range t.require {
		required = append(required, name)
	}
	if required != nil {
		schema["required"] = required
	}
	for _, n := range t.numbers {
		properties[n.name] = n.schema()
	}
	if config, ok := properties["config"].(map[string]any); ok {
		for _, name := range rpc.UnsupportedConfig {
			delete(config["properties"].(map[string]any), name)
		}
	}
	return schema
}
