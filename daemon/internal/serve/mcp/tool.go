package mcp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json/jsontext"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// errorKey is the metadata key of a failed tool call under which programs find the error, as an rpc.Error.
const errorKey = "io.github.msbd/error"

// resultMetaKey is the metadata key of a run under which programs find its result without its output.
const resultMetaKey = "io.github.msbd/result"

// The output of a run is limited for the model's sake. A call can choose another limit, in bytes, with an argument.
const (
	maxOutputArgument = "max_output_bytes"
	defaultMaxOutput  = 50_000
	highestMaxOutput  = 200_000
)

// canceledMessage is the message for a client that canceled its call.
const canceledMessage = "the client canceled the call"

var errCanceled = fmt.Errorf("%s: %w", canceledMessage, context.Canceled)

// tool describes an MCP tool that calls a JSON-RPC method.
type tool struct {
	name, method       string
	title, description string
	hints              sdk.ToolAnnotations
	// needsSandbox means that the sandbox must exist, so that the model should start it if it does not.
	needsSandbox bool
	// text returns the result as text for people and models. It is nil for a run, which has runText.
	text func(result jsontext.Value) string
	// runText is like text. It also returns what programs find under resultMetaKey.
	runText func(result jsontext.Value) (text string, meta any)
}

// nameRule says what the name of a sandbox may be.
const nameRule = "1 to 63 of A-Z a-z 0-9 _ -, beginning with a letter or a digit"

const inNamespace = " If namespace is omitted, the API key's own namespace is used, or \"default\" if the key is not limited to exactly one."

const allNamespaces = "The namespace * stands for all namespaces that the key may use."

const states = "The state is starting, running, stopping or failed; reason says why a sandbox failed."

// readOnly are the hints of a tool that changes nothing.
var readOnly = sdk.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true, OpenWorldHint: new(false)}

var aboutOutput = fmt.Sprintf(" If the output has more than %s bytes (%d unless you set it, at most %d), you get its beginning and its end.",
	maxOutputArgument, defaultMaxOutput, highestMaxOutput)

var tools = []tool{
	{
		name: "sandbox_start", method: rpc.MethodSandboxStart, title: "Start a sandbox",
		description: "Start a sandbox, an isolated microVM, with a name of your choice: " + nameRule + ". " +
			"config.image is microsandbox/python or microsandbox/node, config.memory is in MiB, config.cpus is the number of processors, " +
			"config.envs is a list of NAME=value, and config.workdir is the absolute path of the directory in which runs start. " +
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
			"an expression, its value is printed. timeout is in seconds." + aboutOutput + inNamespace,
		hints:   sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		runText: codeText,
	},
	{
		name: "sandbox_run_command", method: rpc.MethodSandboxCommandRun, needsSandbox: true, title: "Run a command in a sandbox",
		description: "Run a program in a running sandbox. args are passed to it unchanged, without a shell. For shell syntax, run the command sh " +
			"with the args -c and the command line. timeout is in seconds." + aboutOutput + inNamespace,
		hints:   sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		runText: commandText,
	},
	{
		name: "sandbox_list", method: rpc.MethodSandboxList, title: "List the sandboxes",
		description: "List the sandboxes with their state, image and size. " + states + " Memory is in MiB. " + allNamespaces +
			" If the result has a next, call the tool again with it as after to get more." + inNamespace,
		hints: readOnly, text: jsonText,
	},
	{
		name: "sandbox_get", method: rpc.MethodSandboxGet, needsSandbox: true, title: "Get a sandbox",
		description: "Get the state, image and size of a sandbox. " + states + " Memory is in MiB." + inNamespace,
		hints:       readOnly, text: jsonText,
	},
	{
		name: "sandbox_get_metrics", method: rpc.MethodSandboxMetricsGet, needsSandbox: true, title: "Get sandbox metrics",
		description: "List the sandboxes with their state and what each uses: cpu_usage in percent of one processor, memory_usage in MiB, " +
			"disk_usage in bytes. " + states + " Set sandbox to get only that one. " + allNamespaces + inNamespace,
		hints: readOnly, text: jsonText,
	},
}

// resultKey is the member that holds a result that is not an object. It is needed because clients of revisions before
// 2026-07-28 accept only objects as structured content.
const resultKey = "result"

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
	case t.runText != nil: // a run returns only text
	case isObject(result):
		d.OutputSchema = json.RawMessage(result)
	default:
		d.OutputSchema = map[string]any{"type": "object", "properties": map[string]any{resultKey: json.RawMessage(result)}, "required": []string{resultKey}}
	}
	return d
}

// takeMaxOutput removes maxOutputArgument from the arguments of a run and returns it, or its default.
func takeMaxOutput(arguments jsontext.Value) (rest jsontext.Value, maxOutput int, rpcErr *rpc.Error) {
	var members map[string]json.RawMessage
	if json.Unmarshal(arguments, &members) != nil {
		return arguments, defaultMaxOutput, nil // the method refuses what is not an object
	}
	value, given := members[maxOutputArgument]
	if !given {
		return arguments, defaultMaxOutput, nil
	}
	delete(members, maxOutputArgument)
	rest, err := json.Marshal(members)
	maxOutput = defaultMaxOutput
	if err != nil || json.Unmarshal(value, &maxOutput) != nil || maxOutput < 1 || maxOutput > highestMaxOutput {
		return nil, 0, &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf("%s must be an integer from 1 to %d", maxOutputArgument, highestMaxOutput)}
	}
	return rest, maxOutput, nil
}

// inputSchema returns the schema of the tool's arguments. It is the schema of the method's params, without the members of
// config that the method always refuses, because models would use them. The tool of a run has maxOutputArgument instead of
// encoding.
func (t *tool) inputSchema(params jsontext.Value) any {
	schema := decode[map[string]any](params)
	properties := schema["properties"].(map[string]any)
	if t.runText != nil {
		// The output for models is always text, and models choose a language, not a context.
		for _, name := range []string{"encoding", "results", "context"} {
			delete(properties, name)
		}
		if required := schema["required"].([]any); properties["language"] != nil {
			schema["required"] = append(required, "language")
		}
		properties[maxOutputArgument] = map[string]any{
			"type": []string{"integer", "null"}, "minimum": 1, "maximum": highestMaxOutput, "default": defaultMaxOutput,
		}
	}
	if config, ok := properties["config"].(map[string]any); ok {
		for _, name := range rpc.UnsupportedConfig {
			delete(config["properties"].(map[string]any), name)
		}
	}
	return schema
}

// handler returns the library's handler of a tool, which calls the tool's method on behalf of the caller of the HTTP
// request. It returns failures as tool results, so that the model can read them.
func (h *Handler) handler(t tool) sdk.ToolHandler {
	return func(ctx context.Context, req *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		r, ok := ctx.Value(requestKey{}).(*request)
		if !ok {
			return nil, errors.New("call tool: the context has no request")
		}
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(r.ctx, func() { cancel(context.Cause(r.ctx)) })()
		if r.ctx.Err() != nil { // AfterFunc calls its function in another goroutine, a moment later
			cancel(context.Cause(r.ctx))
		}
		stop := h.reportProgress(ctx, req)
		res, rpcErr := h.run(ctx, r, t, arguments(req))
		stop()
		if rpcErr != nil && context.Cause(ctx) == errCanceled {
			rpcErr = &rpc.Error{Code: rpcErr.Code, Message: canceledMessage}
		}
		if rpcErr != nil && rpcErr.Code == rpc.CodeNotFound && t.needsSandbox {
			rpcErr = &rpc.Error{Code: rpcErr.Code, Message: rpcErr.Message + "; start it with sandbox_start", Data: rpcErr.Data}
		}
		if rpcErr != nil {
			text, rpcErr := r.errorText(rpcErr)
			return &sdk.CallToolResult{
				IsError: true, Content: []sdk.Content{&sdk.TextContent{Text: text}}, Meta: sdk.Meta{errorKey: rpcErr},
			}, nil
		}
		return res, nil
	}
}

// errorText returns the text of an error for the model: its message, after what the run had printed. It also returns the error
// without that output, so that the response does not repeat it.
func (r *request) errorText(rpcErr *rpc.Error) (text string, rest *rpc.Error) {
	if rpcErr.Data == nil || rpcErr.Data.PartialOutput == nil {
		return rpcErr.Message, rpcErr
	}
	rest = &rpc.Error{Code: rpcErr.Code, Message: rpcErr.Message}
	text = linesText(rpcErr.Data.Output, rpcErr.Message)
	if r.call.Hold(libraryCopies*len(text)) != nil {
		text = rpcErr.Message
	}
	return text, rest
}

// run calls the method of a tool and returns its result for the model.
func (h *Handler) run(ctx context.Context, r *request, t tool, args jsontext.Value) (*sdk.CallToolResult, *rpc.Error) {
	if t.runText == nil {
		result, rpcErr := h.invoke(ctx, r, t.method, args, nil)
		if rpcErr != nil {
			return nil, rpcErr
		}
		var structured any = json.RawMessage(result)
		if result.Kind() != '{' {
			structured = map[string]any{resultKey: structured}
		}
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: t.text(result)}}, StructuredContent: structured}, nil
	}
	args, maxOutput, rpcErr := takeMaxOutput(args)
	if rpcErr != nil {
		return nil, rpcErr
	}
	result, rpcErr := h.invoke(ctx, r, t.method, args, &wire.Excerpt{Bytes: maxOutput})
	if rpcErr != nil {
		return nil, rpcErr
	}
	// There is no structured content, because it would repeat the output, and some clients show the model only that.
	text, meta := t.runText(result)
	if r.call.Hold(libraryCopies*len(text)) != nil {
		return nil, &rpc.Error{Code: rpc.CodeExhausted, Message: "the run has ended, but there is no room for its output, because other responses are pending; " +
			"print less, write to a file, or send fewer requests at a time"}
	}
	return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: text}}, Meta: sdk.Meta{resultMetaKey: meta}}, nil
}

// libraryCopies is how many more copies of a text exist while the library encodes it. Some escapes are six bytes.
const libraryCopies = 4

// invoke calls a method once the other calls of the same HTTP request have returned.
func (h *Handler) invoke(ctx context.Context, r *request, method string, params jsontext.Value, excerpt *wire.Excerpt) (jsontext.Value, *rpc.Error) {
	select {
	case r.sem <- struct{}{}:
		defer func() { <-r.sem }()
	case <-ctx.Done(): // Call returns the cause
	}
	result, rpcErr := h.methods.Call(ctx, r.call, method, params, excerpt)
	// If the key was refused while the method ran, discard its result.
	if errdefs.IsUnauthorized(context.Cause(r.ctx)) {
		return nil, gateway.ErrNoKey
	}
	return result, rpcErr
}

// arguments returns the arguments of a call, or nil if the client left them out or sent null.
func arguments(req *sdk.CallToolRequest) jsontext.Value {
	args := jsontext.Value(req.Params.Arguments)
	if len(args) == 0 || args.Kind() == 'n' {
		return nil
	}
	return args
}

// reportProgress sends progress notifications until stop is called, if the client asked for them with a progress token.
// The first one is sent before reportProgress returns, so that the client and the proxies before it get the headers of
// the response, and know that the call was accepted.
func (h *Handler) reportProgress(ctx context.Context, req *sdk.CallToolRequest) (stop func()) {
	token := req.Params.GetProgressToken()
	if token == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	start := time.Now()
	notify := func() error {
		elapsed := time.Since(start)
		return req.Session.NotifyProgress(ctx, &sdk.ProgressNotificationParams{
			ProgressToken: token, Progress: elapsed.Seconds(), Message: fmt.Sprintf("running for %s", elapsed.Round(time.Second)),
		})
	}
	if notify() != nil {
		return cancel // the client has disconnected, which cancels the call
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticks := time.NewTicker(h.progressInterval)
		defer ticks.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticks.C:
			}
			if notify() != nil {
				return // as above
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// decode decodes the result of a method.
func decode[R any](result jsontext.Value) (r R) {
	if err := json.Unmarshal(result, &r); err != nil {
		panic(err) // cannot happen: R is the result type of the method
	}
	return r
}

func jsonText(result jsontext.Value) string { return string(result) }

func stringText(result jsontext.Value) string { return decode[string](result) }

func codeText(result jsontext.Value) (text string, meta any) {
	res := decode[rpc.ReplRunResult](result)
	meta = map[string]any{"status": res.Status}
	if res.Status != rpc.StatusSuccess {
		return linesText(res.Output, "(the code failed)"), meta
	}
	return linesText(res.Output, ""), meta
}

func commandText(result jsontext.Value) (text string, meta any) {
	res := decode[rpc.CommandRunResult](result)
	meta = map[string]any{"exit_code": res.ExitCode, "success": res.Success}
	if !res.Success {
		return linesText(res.Output, fmt.Sprintf("(exit code %d)", res.ExitCode)), meta
	}
	return linesText(res.Output, ""), meta
}

// linesText returns the output as a terminal shows it, followed by the line note unless that is empty.
func linesText(output []rpc.Line, note string) string {
	var lines []string
	for _, l := range output {
		lines = append(lines, l.Text)
	}
	if note != "" {
		lines = append(lines, note)
	}
	if lines == nil {
		return "(no output)"
	}
	return strings.Join(lines, "\n")
}
