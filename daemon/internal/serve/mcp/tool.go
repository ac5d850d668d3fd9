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
)

// errorKey is where, in the metadata of a tool's failure, the error is for programs: an rpc.Error.
const errorKey = "io.github.msbd/error"

// What a client is told of its own cancellation.
const cancelled = "the client cancelled the call"

var errCancelled = fmt.Errorf("%s: %w", cancelled, context.Canceled)

// tool is a method in the words of MCP.
type tool struct {
	name, method       string
	title, description string
	hints              sdk.ToolAnnotations
	// text is the result as people and models read it.
	text func(result jsontext.Value) string
}

const inNamespace = " The namespace is the key's own when it is left out."

var tools = []tool{
	{
		name: "sandbox_start", method: rpc.MethodSandboxStart, title: "Start a sandbox",
		description: "Start a sandbox, an isolated microVM, under a name of your choice: 1 to 63 of A-Z a-z 0-9 _ -. " +
			"config.image is microsandbox/python or microsandbox/node; memory is in MiB, envs holds NAME=value. " +
			"To start one that runs with the same config changes nothing." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(false), IdempotentHint: true, OpenWorldHint: new(false)},
		text:  sentence,
	},
	{
		name: "sandbox_stop", method: rpc.MethodSandboxStop, title: "Stop a sandbox",
		description: "Stop a sandbox. Its files and what its code defined are gone then." + inNamespace,
		hints:       sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(false)},
		text:        sentence,
	},
	{
		name: "sandbox_run_code", method: rpc.MethodSandboxReplRun, title: "Run code in a sandbox",
		description: "Run code in a sandbox that was started: language is python or node. What it defines is there for the next run, and the " +
			"value of a last expression is printed. timeout is in seconds." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		text:  codeText,
	},
	{
		name: "sandbox_run_command", method: rpc.MethodSandboxCommandRun, title: "Run a command in a sandbox",
		description: "Run a program in a sandbox that was started. args are passed as they are, without a shell: for shell syntax, run the " +
			"command sh with the args -c and the line. timeout is in seconds." + inNamespace,
		hints: sdk.ToolAnnotations{DestructiveHint: new(true), OpenWorldHint: new(true)},
		text:  commandText,
	},
	{
		name: "sandbox_get_metrics", method: rpc.MethodSandboxMetricsGet, title: "Measure sandboxes",
		description: "Say which sandboxes there are, whether they run, and what they use: cpu_usage in percent of one processor, memory_usage in " +
			"MiB, disk_usage in bytes. Name one with sandbox; the namespace * is all that the key may see." + inNamespace,
		hints: sdk.ToolAnnotations{ReadOnlyHint: true, IdempotentHint: true, OpenWorldHint: new(false)},
		text:  func(result jsontext.Value) string { return string(result) },
	},
}

// wrapped is where a result is that is no object: clients before 2026-07-28 take objects alone.
const wrapped = "result"

func isObject(schema jsontext.Value) bool {
	var s struct {
		Type any `json:"type"`
	}
	return json.Unmarshal(schema, &s) == nil && s.Type == "object"
}

func (t *tool) describe(params, result jsontext.Value) *sdk.Tool {
	var output any = json.RawMessage(result)
	if !isObject(result) {
		output = map[string]any{"type": "object", "properties": map[string]any{wrapped: output}, "required": []string{wrapped}}
	}
	return &sdk.Tool{
		Name: t.name, Title: t.title, Description: t.description, Annotations: &t.hints,
		InputSchema: json.RawMessage(params), OutputSchema: output,
	}
}

// handler calls the tool's method for the request at hand. Whatever keeps that from being done is for the model to read.
func (h *Handler) handler(t tool) sdk.ToolHandler {
	return func(ctx context.Context, req *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		r, ok := ctx.Value(requestKey{}).(*request)
		if !ok {
			return nil, errors.New("call a tool: the request is unknown")
		}
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(r.ctx, func() { cancel(context.Cause(r.ctx)) })()
		if r.ctx.Err() != nil { // that function runs a moment later
			cancel(context.Cause(r.ctx))
		}
		stop := h.reportProgress(ctx, req)
		result, failed := h.invoke(ctx, r, t.method, arguments(req))
		stop()
		var text string
		if failed == nil {
			text = t.text(result)
			failed = reserve(r.call, text, result)
		}
		if failed != nil && context.Cause(ctx) == errCancelled {
			failed = &rpc.Error{Code: rpc.CodeUnavailable, Message: cancelled}
		}
		if failed != nil {
			return &sdk.CallToolResult{
				IsError: true, Content: []sdk.Content{&sdk.TextContent{Text: failed.Message}}, Meta: sdk.Meta{errorKey: failed},
			}, nil
		}
		var structured any = json.RawMessage(result)
		if result.Kind() != '{' {
			structured = map[string]any{wrapped: structured}
		}
		return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: text}}, StructuredContent: structured}, nil
	}
}

// reserve counts what a response holds beyond the result, which is counted already: MCP sends a text twice, and escapes
// more of it. Whatever does not fit is for the model to read as well.
func reserve(c *gateway.Call, text string, result jsontext.Value) *rpc.Error {
	more := encodedSize(text) + encodedSize(string(result)) - len(result)
	if err := c.Hold(more); err != nil {
		return &rpc.Error{Code: rpc.CodeExhausted, Message: fmt.Sprintf("the output takes %d MiB as a result of MCP, more than this key may wait for: "+
			"print less, write to a file, or wait for fewer results at a time", (encodedSize(text)+encodedSize(string(result)))>>20)}
	}
	return nil
}

// encodedSize is how many bytes a text has in the library's JSON, which escapes HTML.
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

// invoke calls a method in its turn.
func (h *Handler) invoke(ctx context.Context, r *request, method string, params jsontext.Value) (jsontext.Value, *rpc.Error) {
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done(): // the method says why
	}
	result, failed := h.methods.Call(ctx, r.call, method, params)
	// If the key was refused while the method ran, discard its result.
	if errdefs.IsUnauthorized(context.Cause(r.ctx)) {
		return nil, gateway.ErrNoKey
	}
	return result, failed
}

// arguments are those of a call; a client may leave them out, or say null.
func arguments(req *sdk.CallToolRequest) jsontext.Value {
	args := jsontext.Value(req.Params.Arguments)
	if len(args) == 0 || args.Kind() == 'n' {
		return nil
	}
	return args
}

// reportProgress reports to a client that asked for it that its call is in progress, until stop is called.
func (h *Handler) reportProgress(ctx context.Context, req *sdk.CallToolRequest) (stop func()) {
	token := req.Params.GetProgressToken()
	if token == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticks := time.NewTicker(h.beat)
		defer ticks.Stop()
		for began := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-ticks.C:
			}
			ran := time.Since(began)
			err := req.Session.NotifyProgress(ctx, &sdk.ProgressNotificationParams{
				ProgressToken: token, Progress: ran.Seconds(), Message: fmt.Sprintf("running for %s", ran.Round(time.Second)),
			})
			if err != nil {
				return // the client has left, which ends the call by itself
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// read decodes what a method of ours answered.
func read[R any](result jsontext.Value) (r R) {
	if err := json.Unmarshal(result, &r); err != nil {
		panic(err) // its schema is of this type
	}
	return r
}

func sentence(result jsontext.Value) string { return read[string](result) }

func codeText(result jsontext.Value) string {
	res := read[rpc.ReplRunResult](result)
	if res.Status != rpc.StatusSuccess {
		return linesText(res.Output, "(the code raised)")
	}
	return linesText(res.Output, "")
}

func commandText(result jsontext.Value) string {
	res := read[rpc.CommandRunResult](result)
	if !res.Success {
		return linesText(res.Output, fmt.Sprintf("(exit code %d)", res.ExitCode))
	}
	return linesText(res.Output, "")
}

// linesText is the output as a terminal shows it, and what else there is to say.
func linesText(output []rpc.Line, end string) string {
	var lines []string
	for _, l := range output {
		lines = append(lines, l.Text)
	}
	if end != "" {
		lines = append(lines, end)
	}
	if lines == nil {
		return "(no output)"
	}
	return strings.Join(lines, "\n")
}
