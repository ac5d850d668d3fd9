package mcp

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// errRefused is logged instead of the library's message, which may quote the client.
var errRefused = errors.New("the MCP library refused the request")

// responseWriter is the response that the library writes. It removes HTML escapes. It intercepts errors that the library writes
// as plain text, so that the client gets them as JSON-RPC errors. If single is set, the stream of events that the library writes
// becomes one JSON document.
type responseWriter struct {
	http.ResponseWriter
	single bool

	mu     sync.Mutex // the library and keepAlive write in several goroutines
	status int        // of an error that was intercepted, or 0
	text   []byte     // its text
}

// WriteHeader implements http.ResponseWriter.
func (w *responseWriter) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if status >= http.StatusBadRequest && !strings.HasPrefix(w.Header().Get("Content-Type"), "application/json") {
		w.status = status
		return
	}
	w.ResponseWriter.WriteHeader(status)
}

// eventStart and eventEnd enclose the message in an event. The library writes each event at once.
var eventStart, eventEnd = []byte("event: message\ndata: "), []byte("\n\n")

// Write implements http.ResponseWriter.
func (w *responseWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.status != 0 {
		if len(w.text) < 1<<10 {
			w.text = append(w.text, p...)
		}
		return len(p), nil
	}
	message := p
	if text, isEvent := bytes.CutPrefix(p, eventStart); w.single && isEvent {
		message = bytes.TrimSuffix(text, eventEnd)
		w.Header().Set("Content-Type", "application/json")
	}
	if _, err := w.ResponseWriter.Write(unescapeHTML(message)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// FlushError sends what was written, unless the response is a single JSON document. http.ResponseController calls it.
func (w *responseWriter) FlushError() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.single {
		return nil
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// beginStream makes the response a stream of events, if it was not written yet.
func (w *responseWriter) beginStream() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.single = false
}

// keepAlive sends a comment, which clients ignore. The response must be a stream of events.
func (w *responseWriter) keepAlive() error {
	if _, err := w.Write([]byte(": keep-alive\n\n")); err != nil {
		return err
	}
	return w.FlushError()
}

// unescapeHTML replaces the escapes of <, > and & in JSON, which the library needlessly writes as six bytes each. It does
// not modify p, which must not end within an escape: the library writes each message at once.
func unescapeHTML(p []byte) []byte {
	if !bytes.Contains(p, []byte(`\u00`)) {
		return p
	}
	out := make([]byte, 0, len(p))
	for {
		i := bytes.IndexByte(p, '\\')
		if i < 0 || i+1 == len(p) {
			return append(out, p...)
		}
		out = append(out, p[:i]...)
		p = p[i:]
		switch {
		case bytes.HasPrefix(p, []byte(`\u003c`)):
			out, p = append(out, '<'), p[6:]
		case bytes.HasPrefix(p, []byte(`\u003e`)):
			out, p = append(out, '>'), p[6:]
		case bytes.HasPrefix(p, []byte(`\u0026`)):
			out, p = append(out, '&'), p[6:]
		default: // another escape, such as that of a backslash
			out, p = append(out, p[:2]...), p[2:]
		}
	}
}

// refusal returns the library's error as a *gateway.Refusal, or nil if the library did not refuse the request.
func (w *responseWriter) refusal() error {
	if w.status == 0 {
		return nil
	}
	return &gateway.Refusal{
		Status: w.status, Cause: errRefused,
		ClientError: &rpc.Error{Code: rpc.CodeInvalidRequest, Message: bounded.Short(strings.TrimSpace(string(w.text)))},
	}
}
