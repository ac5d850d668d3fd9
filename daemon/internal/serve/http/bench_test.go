package http_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// client is one connection that sends the same request again and again, and does as little else as it
// can: what is measured is the server.
type client struct {
	conn    net.Conn
	request []byte
	answer  []byte // as long as each of the answers
}

func dial(b *testing.B, addr string, request []byte) *client {
	b.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := &client{conn: conn, request: request}
	if _, err := conn.Write(request); err != nil {
		b.Fatal(err)
	}
	var first bytes.Buffer
	res, err := http.ReadResponse(bufio.NewReader(io.TeeReader(conn, &first)), nil)
	if err != nil {
		b.Fatal(err)
	}
	if io.Copy(io.Discard, res.Body); res.StatusCode != http.StatusOK {
		b.Fatal(res.Status)
	}
	c.answer = first.Bytes()
	return c
}

func (c *client) roundTrip() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	if _, err := io.ReadFull(c.conn, c.answer); err != nil {
		return err
	}
	if !bytes.HasPrefix(c.answer, []byte("HTTP/1.1 200 OK\r\n")) {
		return fmt.Errorf("answer is %.40q", c.answer)
	}
	return nil
}

// echo is a domain that costs nothing.
type echo struct{ serverpc.Sandboxes }

func (echo) RunCommand(context.Context, sandbox.Name, sandbox.Command) (sandbox.Process, error) {
	return &echoed{}, nil
}

// echoed is a process that prints one line.
type echoed struct{ events int }

func (e *echoed) Next() (sandbox.Event, error) {
	switch e.events++; e.events {
	case 1:
		return hello, nil
	case 2:
		return sandbox.Exit{}, nil
	}
	return nil, io.EOF
}

func (e *echoed) Close() error { return nil }

var hello = sandbox.Output{Stream: sandbox.Stdout, Data: []byte("hello\n")}

// cpuTime is what the process has used of the processors.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var use syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// BenchmarkGateway measures requests over 256 loopback connections that are kept open: with API keys,
// without (dev mode), with API keys and the access log written, and beside a bare net/http handler that
// reads the same body and writes the same answer. They take turns. The ratios are those of processor
// time, clients included, of the median round: a machine that others use does not change them, and at
// full load they are those of the throughput.
func BenchmarkGateway(b *testing.B) {
	body := Request("sandbox.command.run", `{"sandbox":"a","command":"echo","args":["hello"]}`)
	quiet := func(o *Setup) { o.Log, o.Sandboxes = slog.New(slog.DiscardHandler), echo{} }
	logged := func(o *Setup) {
		o.Log, o.Sandboxes = slog.New(slog.NewTextHandler(io.Discard, nil)), echo{}
	}
	auth, dev, log := New(b, quiet), New(b, quiet, func(o *Setup) { o.Dev = true }), New(b, logged)
	var sample *httptest.ResponseRecorder
	for _, s := range []*Site{auth, dev, log} {
		local := func(r *http.Request) { r.Host = "localhost" }
		sample = s.Post(body, local)
	}
	bare := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.ReadAll(r.Body)
		for name, values := range sample.Header() {
			w.Header()[name] = values
		}
		w.Write(sample.Body.Bytes())
	})

	const connections, each = 256, 16
	type variant struct {
		name    string
		clients []*client
		round   []time.Duration // of each round: processor time per request
		took    []time.Duration // of each request
	}
	var variants []*variant
	for _, c := range []struct {
		name    string
		handler http.Handler
		key     string
	}{{"bare", bare, auth.Key}, {"open", dev, auth.Key}, {"auth", auth, auth.Key}, {"auth+log", log, log.Key}} {
		server := httptest.NewServer(c.handler)
		b.Cleanup(server.Close)
		request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept-Encoding: gzip\r\nContent-Type: application/json\r\n"+
			"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", rpc.Path, c.key, len(body), body)
		v := &variant{name: c.name}
		for range connections {
			v.clients = append(v.clients, dial(b, strings.TrimPrefix(server.URL, "http://"), request))
		}
		variants = append(variants, v)
	}
	b.ResetTimer()
	for b.Loop() {
		for _, v := range variants {
			took := make([]time.Duration, connections*each)
			began := cpuTime(b)
			var wg sync.WaitGroup
			for i, c := range v.clients {
				wg.Go(func() {
					for n := range each {
						sent := time.Now()
						if err := c.roundTrip(); err != nil {
							b.Error(err)
							return
						}
						took[i*each+n] = time.Since(sent)
					}
				})
			}
			wg.Wait()
			v.round = append(v.round, (cpuTime(b)-began)/(connections*each))
			v.took = append(v.took, took...)
		}
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	median := func(d []time.Duration, of float64) float64 {
		slices.Sort(d)
		return float64(d[int(of*float64(len(d)-1))])
	}
	floor := median(variants[0].round, .5)
	for _, v := range variants {
		b.ReportMetric(median(v.round, .5), v.name+"-cpu-ns/request")
		b.ReportMetric(100*floor/median(v.round, .5), v.name+"-%-of-bare")
		b.ReportMetric(median(v.took, .5)/1e6, v.name+"-p50-ms")
		b.ReportMetric(median(v.took, .99)/1e6, v.name+"-p99-ms")
	}
	b.ReportMetric(100*median(variants[1].round, .5)/median(variants[2].round, .5), "auth-%-of-open")
}

// BenchmarkHandler measures what the gateway itself takes, without a connection.
func BenchmarkHandler(b *testing.B) {
	s := New(b, func(o *Setup) { o.Log, o.Sandboxes = slog.New(slog.DiscardHandler), echo{} })
	body := Request("sandbox.command.run", `{"sandbox":"a","command":"echo","args":["hello"]}`)
	r := httptest.NewRequest(http.MethodPost, rpc.Path, nil)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+s.Key)
	r.ContentLength = int64(len(body))
	text := strings.NewReader(body)
	r.Body = io.NopCloser(text)
	w := &discard{header: http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		text.Reset(body)
		clear(w.header)
		if s.ServeHTTP(w, r); w.status != http.StatusOK {
			b.Fatal(w.status)
		}
	}
}

// discard is a ResponseWriter to nobody.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(status int)      { d.status = status }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
