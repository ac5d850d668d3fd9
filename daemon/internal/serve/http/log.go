package http

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
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
	log, limits := c.gateway.Options.Log, c.gateway.refusalLog
	if rpcErr == nil {
		limits = c.gateway.successLog
	}
	if level == slog.LevelInfo && !limits.allow(c.Principal.KeyID) {
		level = slog.LevelDebug
	}
	if !log.Enabled(ctx, level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 10), slog.String("request_id", c.ID), slog.String("method", method),
		slog.String("namespace", namespace), slog.String("key_id", c.Principal.KeyID), slog.String("source", c.Source()),
		slog.Int("status", status), slog.Duration("duration", duration))
	if rpcErr != nil {
		attrs = append(attrs, slog.Int("code", int(rpcErr.Code)))
		if quotesNothing(rpcErr.Code, cause) {
			attrs = append(attrs, slog.Any("err", cause))
		}
	}
	log.LogAttrs(ctx, level, "call", attrs...)
}

// quotesNothing reports whether err, an error with a code, quotes no text of a client or a sandbox other than valid names, so
// that it may be logged.
func quotesNothing(code rpc.Code, err error) bool {
	switch code {
	case rpc.CodeInternal, rpc.CodeUnavailable, rpc.CodeExhausted, rpc.CodePermissionDenied, rpc.CodeUnauthenticated:
		return !errors.Is(err, sandbox.ErrSandboxFull) // which quotes the sandbox
	}
	return false
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
	// A client that disconnects is not an error of the server, because any client can do that.
	if !c.response.clientGone && status == http.StatusInternalServerError || c.panicked {
		level = slog.LevelError
	} else {
		limits := g.refusalLog
		if c.Principal.KeyID == "" {
			limits = g.strangerLog
		}
		if !limits.allow(c.Principal.KeyID) {
			level = slog.LevelDebug
		}
	}
	g.Options.Log.LogAttrs(ctx, level, message,
		slog.String("request_id", c.ID), slog.String("path", c.path), slog.String("key_id", c.Principal.KeyID),
		slog.String("source", c.Source()), slog.Int("status", status),
		slog.Duration("duration", time.Since(c.began)), slog.Any("err", cause))
}

// lineLimits limits the log lines at level INFO about the requests of each key, so that no client fills the disk. The
// metrics still count all requests.
type lineLimits struct {
	perSecond rate.Limit
	burst     int
	log       *slog.Logger
	message   string // of the line with the number of those that were left out

	mu    sync.Mutex
	byKey *limit.LRU[string, *lines]
}

// lines are the log lines about the requests of one key.
type lines struct {
	limiter *rate.Limiter
	leftOut int // those that were left out since the last line with their number
}

func newLineLimits(log *slog.Logger, perSecond rate.Limit, burst int, message string) *lineLimits {
	return &lineLimits{
		perSecond: perSecond, burst: burst, log: log, message: message,
		byKey: limit.NewLRU[string, *lines](limit.MaxRates),
	}
}

// allow reports whether a line about a request of the key with this id may be written. If not, it writes within
// leftOutInterval how many lines were left out. The id "" stands for all requests without a valid key.
func (l *lineLimits) allow(keyID string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	of, ok := l.byKey.Get(keyID)
	if !ok {
		of = &lines{limiter: rate.NewLimiter(l.perSecond, l.burst)}
		l.byKey.Put(keyID, of)
	}
	if of.limiter.Allow() {
		return true
	}
	if of.leftOut++; of.leftOut == 1 {
		time.AfterFunc(leftOutInterval, func() {
			l.mu.Lock()
			n := of.leftOut
			of.leftOut = 0
			l.mu.Unlock()
			l.log.Info(l.message, "key_id", keyID, "left_out", n)
		})
	}
	return false
}
