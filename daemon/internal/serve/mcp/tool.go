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
	"github.com/google/jsonschema-go/jsonschema"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
)

// errorKey is the metadata key of a failed tool call under which programs find the error, as an rpc.Error.
const errorKey = "io.github.msbd/error"

// canceledMessage is the message for a client that canceled its call.
const canceledMessage = "the client canceled the call"

var errCanceled = fmt.Errorf("%s: %w", canceledMessage, context.Canceled)

// tool describes an MCP tool that calls a JSON-RPC method.
type tool struct {
	name, method       string
	title, description string
	hints              sdk.ToolAnnotations
	// text returns the result as text for people and models.
	text func(result jsontext.Value) string
}

// nameRule says what the name of a sandbox may be.
const nameRule = "1 to 63 of A-Z a-z 0-9 _ -, beginning with a letter or a digit"

const inNamespace = " If namespace is omitted, the API key's own namespace is used, or \"default\" if the key is not limited to exactly one."

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
		name: "sandbox_run_code", method: rpc.MethodSandboxReplRun, title: "Run code in a sandbox",
		description: "Run code in a running sandbox. language is python or node. Later runs can use what the code defines. If the code ends with " +
			"an expression, its value is printed. timeout is in seconds." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		text:  codeText,
	},
	{
		name: "sandbox_run_command", method: rpc.MethodSandboxCommandRun, title: "Run a command in a sandbox",
		description: "Run a program in a running sandbox. args are passed to it unchanged, without a shell. For shell syntax, run the command sh " +
			"with the args -c and the command line. timeout is in seconds." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		text:  commandText,
	},
	{
		name: "sandbox_get_metrics", method: rpc.MethodSandboxMetricsGet, title: "Get sandbox metrics",
		description: "List the sandboxes, whether each is running, and what it uses: cpu_usage in percent of one processor, memory_usage in MiB, " +
			"disk_usage in bytes. Set sandbox to get only that one. The namespace * stands for all namespaces that the key may use." + inNamespace,
		hints: sdk.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true, OpenWorldHint: new(false)},
		text:  func(result jsontext.Value) string { return string(result) },
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
	var output any = json.RawMessage(result)
	if !isObject(result) {
		output = map[string]any{"type": "object", "properties": map[string]any{resultKey: output}, "required": []string{resultKey}}
	}
	return &sdk.Tool{
		Name: t.name, Title: t.title, Description: t.description, Annotations: &t.hints,
		InputSchema: inputSchema(params), OutputSchema: output,
	}
}

// inputSchema returns the schema of a tool's arguments. It is the schema of the method's params, without the members of
// config that the method always refuses. If a tool offered them, models would use them.
func inputSchema(params jsontext.Value) *jsonschema.Schema {
	var s jsonschema.Schema
	if err := json.Unmarshal(params, &s); err != nil {
		panic(err) // cannot happen: params is a JSON Schema
	}
	if config := s.Properties["config"]; config != nil {
		for _, name := range rpc.UnsupportedConfig {
			delete(config.Properties, name)
		}
	}
	return &s
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
		result, rpcErr := h.invoke(ctx, r, t.method, arguments(req))
		stop()
		var text string
		if rpcErr == nil {
			text = t.text(result)
			rpcErr = reserve(r.call, text, result)
		}
		if rpcErr != nil && context.Cause(ctx) == errCanceled {
			rpcErr = &rpc.Error{Code: rpc.CodeUnavailable, Message: canceledMessage}
		}
		if rpcErr != nil {
			return &sdk.CallToolResult{
				IsError: true, Content: []sdk.Content{&sdk.TextContent{Text: rpcErr.Message}}, Meta: sdk.Meta{errorKey: rpcErr},
			}, nil
		}
		var structured any = json.RawMessage(result)
		if result.Kind() != '{' {
			structured = map[string]any{resultKey: structured}
		}
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: text}}, StructuredContent: structured}, nil
	}
}

// reserve counts the bytes of the response that exceed result, which is counted already, against the output limits. There
// are such bytes because MCP sends the output twice and escapes more characters than JSON-RPC does.
func reserve(c *gateway.Call, text string, result jsontext.Value) *rpc.Error {
	additional := encodedSize(text) + encodedSize(string(result)) - len(result)
	if err := c.Hold(additional); err != nil {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the output takes %d MiB as an MCP result, which is too much together with the other pending responses; "+
			"print less, write to a file, or send fewer requests at a time", (encodedSize(text)+encodedSize(string(result)))>>20)}
	}
	return nil
}

// encodedSize returns how many bytes text takes as JSON from the library, which also escapes <, > and &.
func encodedSize(text string) int {
	size := len(text)
	for i := range len(text) {
		switch c := text[i]; {
		case c == '<', c == '>', c == '&', c < ' ':
			size += 5
		case c == '"', c == '\\':
			size++
		}
	}
	return size
}

// invoke calls a method once the other calls of the same HTTP request have returned.
func (h *Handler) invoke(ctx context.Context, r *request, method string, params jsontext.Value) (jsontext.Value, *rpc.Error) {
	select {
	case r.sem <- struct{}{}:
		defer func() { <-r.sem }()
	case <-ctx.Done(): // Call returns the cause
	}
	result, rpcErr := h.methods.Call(ctx, r.call, method, params)
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

func stringText(result jsontext.Value) string { return decode[string](result) }

func codeText(result jsontext.Value) string {
	res := decode[rpc.ReplRunResult](result)
	if res.Status != rpc.StatusSuccess {
		return linesText(res.Output, "(the code failed)")
	}
	return linesText(res.Output, "")
}

func commandText(result jsontext.Value) string {
	res := decode[rpc.CommandRunResult](result)
	if !res.Success {
		return linesText(res.Output, fmt.Sprintf("(exit code %d)", res.ExitCode))
	}
	return linesText(res.Output, "")
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
