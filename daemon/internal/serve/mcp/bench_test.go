package mcp

import (
	"io"
	"log/slog"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
)

// BenchmarkCall compares a tool call with the same call over JSON-RPC. The domain takes no time.
func BenchmarkCall(b *testing.B) {
	for _, c := range []struct{ name, path, body string }{
		{"rpc", rpc.Path, `{"jsonrpc":"2.0","id":1,"method":"sandbox.repl.run","params":{"sandbox":"a","language":"python","code":"1+1"}}`},
		{"mcp", rpc.MCPPath, toolCall(1, "sandbox_run_code", `{"sandbox":"a","language":"python","code":"1+1"}`)},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := newSite(b, func(o *gateway.Options) { o.Log = slog.New(slog.NewTextHandler(io.Discard, nil)) })
			var durations []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				start := time.Now()
				w := s.post(c.body, func(r *http.Request) { r.URL.Path = c.path })
				durations = append(durations, time.Since(start))
				if w.Code != http.StatusOK {
					b.Fatal(w.Body)
				}
				s.sandboxes.takeCalls()
			}
			slices.Sort(durations)
			b.ReportMetric(float64(durations[len(durations)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(durations[len(durations)*99/100].Microseconds()), "p99-µs")
		})
	}
}
