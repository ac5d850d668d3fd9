package rpc

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
)

// maxSilence is the time after the last event at which a stream of events sends a comment, so that proxies keep its connection
// and a client that has disconnected is noticed.
const maxSilence = 15 * time.Second

// acceptsOnlyEvents reports whether the Accept header of a request has rpc.EventStream, but not JSON.
func acceptsOnlyEvents(h http.Header) bool {
	accepted := gateway.Accepted(h)
	return slices.Contains(accepted, rpc.EventStream) && !slices.Contains(accepted, "application/json")
}

// serveEvents responds to a single call with a stream of events. A call that is refused before its method begins gets an
// ordinary response.
func (s *Service) serveEvents(c *gateway.Call, w http.ResponseWriter, r *http.Request, req parsedRequest) error {
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	call := &call{Call: c, events: &events{call: c, w: w, cancel: cancel}}
	result, rpcErr := s.invoke(ctx, call, req)
	if cause := context.Cause(r.Context()); errdefs.IsUnauthorized(cause) {
		return cause // the key was refused meanwhile, so the gateway ends the response
	}
	switch {
	case rpcErr != nil && !call.events.begun:
		return writeResponse(w, nil, rpcErr, req.ID)
	case rpcErr != nil:
		return call.events.send(rpc.EventError, rpcErr)
	}
	if err := call.events.begin(); err != nil {
		return err
	}
	return call.events.send(rpc.EventResult, result)
}

// events is a response that is a stream of server-sent events. Only the goroutine that serves the request uses it.
type events struct {
	call   *gateway.Call
	w      http.ResponseWriter
	cancel context.CancelCauseFunc // ends the call
	begun  bool
	gone   bool // whether a write failed
	// silence fires when nothing was sent for maxSilence.
	silence *time.Timer
}

// errClientGone is why a call ends whose events cannot be sent.
var errClientGone = fmt.Errorf("the client disconnected, or did not read the response in time: %w", context.Canceled)

// begin sends the headers, unless they were sent already.
func (e *events) begin() error {
	if e.begun {
		return nil
	}
	e.begun = true
	e.call.TakeTurns() // there is no limit to how much it sends
	e.silence = time.NewTimer(maxSilence)
	e.w.Header().Set("Content-Type", rpc.EventStream)
	return e.write("")
}

// send sends an event. If that fails, the call ends.
func (e *events) send(event string, data any) error {
	text, err := json.Marshal(data, encoding)
	if err != nil {
		return err
	}
	return e.write("event: %s\ndata: %s\n\n", event, text)
}

// keepAlive sends a comment.
func (e *events) keepAlive() error { return e.write(": keep-alive\n\n") }

func (e *events) write(format string, args ...any) error {
	if e.gone {
		return errClientGone
	}
	_, err := fmt.Fprintf(e.w, format, args...)
	if err == nil {
		err = http.NewResponseController(e.w).Flush()
	}
	if err != nil {
		e.gone = true
		e.cancel(errClientGone)
		return errClientGone
	}
	e.silence.Reset(maxSilence)
	return nil
}

// wait calls f, which waits for something else than a processor, as Call.Wait does. If the response is a stream of events,
// wait keeps it alive meanwhile.
func (c *call) wait(f func()) {
	if c.events == nil {
		c.Wait(f)
		return
	}
	done := make(chan any, 1) // gets what f panicked with, or nil
	go func() {
		defer func() {
			v := recover()
			if v != nil {
				v = fmt.Sprintf("%v\n%s", v, debug.Stack())
			}
			done <- v
		}()
		f()
	}()
	for waiting := true; waiting; {
		var silent bool
		var panicked any
		c.Wait(func() {
			select {
			case panicked = <-done:
				waiting = false
			case <-c.events.silence.C:
				silent = true
			}
		})
		if panicked != nil {
			panic(panicked)
		}
		if silent {
			_ = c.events.keepAlive() // if it fails, the context ends, and so f returns
		}
	}
}
