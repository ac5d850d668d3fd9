package http

import (
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// Log writes a line of the access log for a call of a method. rpcErr and cause are nil if the call succeeded. Of
// the text that a client sent, the line contains only valid names of namespaces and sandboxes. If an error may quote
// other text of the request, the line has its code but not its message.
func (c *Call) Log(ctx context.Context, method, namespace string, rpcErr *rpc.Error, duration time.Duration, cause error) {
	status := http.StatusOK
	if rpcErr != nil {
		status = rpcerr.HTTPStatus(rpcErr.Code)
	}
	c.log(ctx, method, namespace, status, rpcErr, duration, cause)
}

// log is like Log but also takes the HTTP status.
func (c *Call) log(ctx context.Context, method, namespace string, status int, rpcErr *rpc.Error, duration time.Duration, cause error) {
	level := slog.LevelInfo
	if rpcErr != nil && rpcErr.Code == rpc.CodeInternal {
		level = slog.LevelError
	}
	log := c.gateway.Options.Log
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 10), slog.String("request_id", c.ID), slog.String("method", method),
		slog.String("namespace", namespace), slog.String("key_id", c.Principal.KeyID), slog.String("source", c.Source()),
		slog.Int("status", status), slog.Duration("duration", duration))
	if rpcErr != nil {
		attrs = append(attrs, slog.Int("code", int(rpcErr.Code)))
		switch rpcErr.Code {
		case rpc.CodeInternal, rpc.CodeUnavailable, rpc.CodeExhausted, rpc.CodePermissionDenied, rpc.CodeUnauthenticated:
			attrs = append(attrs, slog.Any("err", cause))
		}
	}
	log.LogAttrs(ctx, level, "call", attrs...)
}

// logFailure writes a log line about a request that was refused, or that failed after its endpoint was called.
func (g *Gateway) logFailure(ctx context.Context, c *Call, cause error) {
	status := c.response.status
	message, level := "request refused", slog.LevelInfo
	switch {
	case c.response.clientGone:
		message = "client disconnected"
	case status >= http.StatusInternalServerError, c.panicked:
		message = "request failed"
	}
	switch {
	case c.response.clientGone: // not an error of the server, because any client can cause it
	case status == http.StatusInternalServerError, c.panicked:
		level = slog.LevelError
	case c.Principal.KeyID == "" && !g.refusalLog.Allow():
		// A flood of requests without a valid key must not fill the disk. The metrics still count them.
		level = slog.LevelDebug
	}
	g.Options.Log.LogAttrs(ctx, level, message,
		slog.String("request_id", c.ID), slog.String("path", c.path), slog.String("key_id", c.Principal.KeyID),
		slog.String("source", c.Source()), slog.Int("status", status),
		slog.Duration("duration", time.Since(c.began)), slog.Any("err", cause))
}
