package http

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// Log writes a line of the access log: a call of a method, or a request to an endpoint. What a client sent is not in
// it: of errors that may quote that, there is only the code. failed and cause are nil for a call that succeeded.
func (c *Call) Log(ctx context.Context, method, namespace string, failed *rpc.Error, took time.Duration, cause error) {
	status := http.StatusOK
	if failed != nil {
		status = rpcerr.HTTPStatus(failed.Code)
	}
	c.log(ctx, method, namespace, status, failed, took, cause)
}

func (c *Call) log(ctx context.Context, method, namespace string, status int, failed *rpc.Error, took time.Duration, cause error) {
	level := slog.LevelInfo
	if failed != nil && failed.Code == rpc.CodeInternal {
		level = slog.LevelError
	}
	log := c.gateway.Options.Log
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 10), slog.String("request_id", c.ID), slog.String("method", method),
		slog.String("namespace", namespace), slog.String("key_id", c.Principal.KeyID), slog.String("source", c.Source()),
		slog.Int("status", status), slog.Duration("duration", took))
	if failed != nil {
		attrs = append(attrs, slog.Int("code", int(failed.Code)))
		switch failed.Code {
		case rpc.CodeInternal, rpc.CodeUnavailable, rpc.CodeExhausted, rpc.CodePermissionDenied, rpc.CodeUnauthenticated:
			attrs = append(attrs, slog.Any("err", cause))
		}
	}
	log.LogAttrs(ctx, level, "call", attrs...)
}

// logRefused writes a line about a request that an endpoint did not answer.
func (g *Gateway) logRefused(ctx context.Context, c *Call, cause error) {
	status := c.response.status
	level := slog.LevelInfo
	switch {
	case c.response.clientGone: // any client can do that
	case status == http.StatusInternalServerError, c.panicked:
		level = slog.LevelError
	case errors.Is(cause, errTooManyBadKeys):
		level = slog.LevelDebug
	case c.Principal.KeyID == "" && !g.refusalLog.Allow():
		// A flood that does no harm here must not fill the disk either: it is counted by the metrics.
		level = slog.LevelDebug
	}
	g.Options.Log.LogAttrs(ctx, level, "request refused",
		slog.String("request_id", c.ID), slog.String("path", c.path), slog.String("key_id", c.Principal.KeyID),
		slog.String("source", c.Source()), slog.Int("status", status),
		slog.Duration("duration", time.Since(c.began)), slog.Any("err", cause))
}
