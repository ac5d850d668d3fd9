package gateway

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/token"
)

// open lets everyone in.
type open struct{}

func (open) Verify(string) (token.Principal, error) { return token.Principal{KeyID: "open"}, nil }

// BenchmarkRequest measures one request over loopback HTTP, on 256 connections that are kept open:
// with authentication, without, and beside a bare net/http handler that reads and writes as much.
func BenchmarkRequest(b *testing.B) {
	body := request("sandbox.command.run", `{"sandbox":"a","command":"echo","args":["hello"]}`)
	quiet := func(o *Options) { o.Log = slog.New(slog.DiscardHandler) }
	auth := newSite(b, quiet)
	noAuth := newSite(b, quiet, func(o *Options) { o.Verifier = open{} })
	for _, s := range []*site{auth, noAuth} {
		s.post(request("sandbox.start", `{"sandbox":"a"}`))
	}
	answer := auth.post(body).Body.Bytes()
	bare := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.Write(answer)
	})
	for _, c := range []struct {
		name    string
		handler http.Handler
	}{{"authenticated", auth}, {"unauthenticated", noAuth}, {"bare", bare}} {
		b.Run(c.name, func(b *testing.B) {
			server := httptest.NewServer(c.handler)
			defer server.Close()
			const connections = 256
			transport := &http.Transport{MaxIdleConnsPerHost: connections, DialContext: (&net.Dialer{}).DialContext}
			defer transport.CloseIdleConnections()
			b.SetParallelism(connections / runtime.GOMAXPROCS(0))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					r, _ := http.NewRequest(http.MethodPost, server.URL+rpc.Path, strings.NewReader(body))
					r.Header.Set("Content-Type", "application/json")
					r.Header.Set("Authorization", "Bearer "+auth.key)
					res, err := transport.RoundTrip(r)
					if err != nil {
						b.Error(err)
						return
					}
					io.Copy(io.Discard, res.Body)
					res.Body.Close()
					if res.StatusCode != http.StatusOK {
						b.Error(res.Status)
						return
					}
				}
			})
		})
	}
}

// BenchmarkHandler measures what the gateway itself takes, without a connection.
func BenchmarkHandler(b *testing.B) {
	s := newSite(b, func(o *Options) { o.Log = slog.New(slog.DiscardHandler) })
	s.post(request("sandbox.start", `{"sandbox":"a"}`))
	body := request("sandbox.command.run", `{"sandbox":"a","command":"echo","args":["hello"]}`)
	b.ReportAllocs()
	for b.Loop() {
		if w := s.post(body); w.Code != http.StatusOK {
			b.Fatal(w.Body)
		}
	}
}
