package mcp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json/jsontext"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// errorKey is the metadata key of a failed tool call under which programs find the error, as an rpc.Error.
const errorKey = "io.github.msbd/error"

// resultMetaKey is the metadata key of a result that is only text under which programs find the rest of the result.
const resultMetaKey = "io.github.msbd/result"

// resultKey is the member that holds a result that is not an object. It is needed because clients of revisions before
// 2026-07-28 accept only objects as structured content.
const resultKey = "result"

// canceledMessage is the message for a client that canceled its call.
const canceledMessage = "the client canceled the call"

var errCanceled = fmt.Errorf("%s: %w", canceledMessage, context.Canceled)

// libraryCopies is how many more copies of a text exist while the library encodes it. Some escapes are six bytes. If the escapes are
// counted, encodedCopies are enough.
const (
	libraryCopies = 4
	encodedCopies = 3
)

// errNoRoom is the error of a call whose result would exceed the limits on held bytes.
var errNoRoom = &rpc.Error{Code: rpc.CodeExhausted, Message: "there is no room for the result, because other responses are pending; " +
	"ask for less, or send fewer requests at a time"}

// call is a call of a tool, or of another method of MCP that calls methods of JSON-RPC.
type call struct {
	arguments
	ctx     context.Context
	handler *Handler
	request *request
}

// begin returns a call on behalf of the caller of the HTTP request that the library handles with ctx. The context of the call
// ends when the request is canceled. end must be called.
func (h *Handler) begin(ctx context.Context, arguments arguments) (c *call, end func(), err error) {
	r, ok := ctx.Value(requestKey{}).(*request)
	if !ok {
		return nil, nil, errors.New("the context has no request")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(r.ctx, func() { cancel(context.Cause(r.ctx)) })
	if r.ctx.Err() != nil { // AfterFunc calls its function in another goroutine, a moment later
		cancel(context.Cause(r.ctx))
	}
	return &call{arguments, ctx, h, r}, func() { stop(); cancel(nil) }, nil
}

// toolHandler returns the library's handler of a tool. It returns failures as tool results, so that the model can read them.
func (h *Handler) toolHandler(t tool) sdk.ToolHandler {
	return func(ctx context.Context, req *sdk.CallToolRequest) (*sdk.CallToolResult, error) {
		c, end, err := h.begin(ctx, parseArguments(jsontext.Value(req.Params.Arguments)))
		if err != nil {
			return nil, fmt.Errorf("call tool: %w", err)
		}
		defer end()
		stop := c.reportProgress(req)
		run := t.run
		if t.text != nil {
			run = t.runMethod
		}
		res, rpcErr := run(c)
		stop()
		if rpcErr == nil {
			return res, nil
		}
		if context.Cause(c.ctx) == errCanceled {
			rpcErr = &rpc.Error{Code: rpcErr.Code, Message: canceledMessage}
		}
		if rpcErr.Code == rpc.CodeNotFound && t.needsSandbox {
			rpcErr = &rpc.Error{Code: rpcErr.Code, Message: rpcErr.Message + "; start it with sandbox_start", Data: rpcErr.Data}
		}
		text, rpcErr := c.errorText(rpcErr)
		failed := &sdk.CallToolResult{IsError: true, Content: []sdk.Content{&sdk.TextContent{Text: text}}, Meta: sdk.Meta{errorKey: rpcErr}}
		if res != nil { // more of what the run printed
			failed.Content = append(failed.Content, res.Content...)
		}
		return failed, nil
	}
}

// errorText returns the text of an error for the model: its message, after what the run had printed. It also returns the error
// without that output, so that the response does not repeat it.
func (c *call) errorText(rpcErr *rpc.Error) (text string, rest *rpc.Error) {
	if rpcErr.Data == nil || rpcErr.Data.PartialOutput == nil {
		return rpcErr.Message, rpcErr
	}
	rest = &rpc.Error{Code: rpcErr.Code, Message: rpcErr.Message}
	text = linesText(rpcErr.Data.Output, rpcErr.Message)
	if c.hold(libraryCopies*len(text)) != nil {
		text = rpcErr.Message
	}
	return text, rest
}

// hold counts bytes that are held for a result.
func (c *call) hold(bytes int) *rpc.Error {
	if c.request.call.Hold(bytes) != nil {
		return errNoRoom
	}
	return nil
}

// invoke calls a method once the other calls of the same HTTP request have returned.
func (c *call) invoke(method string, params jsontext.Value, excerpt *wire.Excerpt) (jsontext.Value, *rpc.Error) {
	r := c.request
	select {
	case r.sem <- struct{}{}:
		defer func() { <-r.sem }()
	case <-c.ctx.Done(): // Call returns the cause
	}
	result, rpcErr := c.handler.methods.Call(c.ctx, r.call, method, params, excerpt)
	// If the key was refused while the method ran, discard its result.
	if errdefs.IsUnauthorized(context.Cause(r.ctx)) {
		return nil, gateway.ErrNoKey
	}
	return result, rpcErr
}

// callMethod calls a method and decodes its result.
func callMethod[R any](c *call, method string, params jsontext.Value) (r R, rpcErr *rpc.Error) {
	result, rpcErr := c.invoke(method, params, nil)
	if rpcErr == nil {
		r = decode[R](result)
	}
	return r, rpcErr
}

// textResult returns a result that is text for the model. meta is what programs find under resultMetaKey. There is no
// structured content, because it would repeat the text, and some clients show the model only that.
func (c *call) textResult(meta any, texts ...string) (*sdk.CallToolResult, *rpc.Error) {
	res := &sdk.CallToolResult{Meta: sdk.Meta{resultMetaKey: meta}}
	for _, text := range texts {
		if rpcErr := c.hold(libraryCopies * len(text)); rpcErr != nil {
			return nil, rpcErr
		}
		res.Content = append(res.Content, &sdk.TextContent{Text: text})
	}
	return res, nil
}

// decode decodes the result of a method.
func decode[R any](result jsontext.Value) (r R) {
	if err := json.Unmarshal(result, &r); err != nil {
		panic(err) // cannot happen: R is the result type of the method
	}
	return r
}

// runMethod calls the method of a tool that has text.
func (t *tool) runMethod(c *call) (*sdk.CallToolResult, *rpc.Error) {
	result, rpcErr := c.invoke(t.method, c.params(nil), nil)
	if rpcErr != nil {
		return nil, rpcErr
	}
	var content any = json.RawMessage(result)
	if result.Kind() != '{' {
		content = map[string]any{resultKey: content}
	}
	return &sdk.CallToolResult{Content: []sdk.Content{&sdk.TextContent{Text: t.text(result)}}, StructuredContent: content}, nil
}

func jsonText(result jsontext.Value) string { return string(result) }

func stringText(result jsontext.Value) string { return decode[string](result) }

// doneText is the text of a result that is empty.
func doneText(jsontext.Value) string { return "Done" }
