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

// client sends the same request over one connection again and again. It does as little else as possible, so that the
// benchmark measures the server.
type client struct {
	conn     net.Conn
	request  []byte
	response []byte // the last response; all responses have the same length
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
	c.response = first.Bytes()
	return c
}

func (c *client) roundTrip() error {
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	if _, err := io.ReadFull(c.conn, c.response); err != nil {
		return err
	}
	if !bytes.HasPrefix(c.response, []byte("HTTP/1.1 200 OK\r\n")) {
		return fmt.Errorf("response is %.40q, want status 200", c.response)
	}
	return nil
}

// helloSandboxes is a sandbox domain that costs almost nothing. Every command prints "hello".
type helloSandboxes struct{ serverpc.Sandboxes }

func (helloSandboxes) RunCommand(context.Context, sandbox.Name, sandbox.Command) (sandbox.Process, error) {
	return &helloProcess{}, nil
}

// helloProcess is a process that prints one line.
type helloProcess struct{ events int }

func (p *helloProcess) Next() (sandbox.Event, error) {
	switch p.events++; p.events {
	case 1:
		return helloOutput, nil
	case 2:
		return sandbox.Exit{}, nil
	}
	return nil, io.EOF
}

func (p *helloProcess) Close() error { return nil }

var helloOutput = sandbox.Output{Stream: sandbox.Stdout, Data: []byte("hello\n")}

// cpuTime returns the CPU time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkGateway measures requests over 256 loopback connections that are kept open. It compares four servers, which
// take turns: a bare net/http handler that reads the same body and writes the same response ("bare"), the gateway in dev
// mode ("open"), with API keys ("auth"), and with API keys and the access log ("auth+log"). The ratios compare the CPU
// time of the median round, including that of the clients. They do not depend on the other load of the machine, and at
// full load they equal the ratios of the throughput.
func BenchmarkGateway(b *testing.B) {
	body := Request("sandbox.command.run", `{"sandbox":"a","command":"echo","args":["hello"]}`)
	quiet := func(o *Setup) { o.Log, o.Sandboxes = slog.New(slog.DiscardHandler), helloSandboxes{} }
	logged := func(o *Setup) {
		o.Log, o.Sandboxes = slog.New(slog.NewTextHandler(io.Discard, nil)), helloSandboxes{}
	}
	auth, dev, log := New(b, quiet), New(b, quiet, func(o *Setup) { o.Dev = true }), New(b, logged)
	var sample *httptest.ResponseRecorder
	for _, s := range []*Site{auth, dev, log} {
		localhost := func(r *http.Request) { r.Host = "localhost" }
		sample = s.Post(body, localhost)
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
		cpu     []time.Duration // the CPU time per request in each round
		latency []time.Duration // of each request
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
			latency := make([]time.Duration, connections*each)
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
						latency[i*each+n] = time.Since(sent)
					}
				})
			}
			wg.Wait()
			v.cpu = append(v.cpu, (cpuTime(b)-began)/(connections*each))
			v.latency = append(v.latency, latency...)
		}
	}
	b.StopTimer()
	b.ReportMetric(0, "ns/op")
	quantile := func(d []time.Duration, q float64) float64 {
		slices.Sort(d)
		return float64(d[int(q*float64(len(d)-1))])
	}
	bareCPU := quantile(variants[0].cpu, .5)
	for _, v := range variants {
		b.ReportMetric(quantile(v.cpu, .5), v.name+"-cpu-ns/request")
		b.ReportMetric(100*bareCPU/quantile(v.cpu, .5), v.name+"-%-of-bare")
		b.ReportMetric(quantile(v.latency, .5)/1e6, v.name+"-p50-ms")
		b.ReportMetric(quantile(v.latency, .99)/1e6, v.name+"-p99-ms")
	}
	b.ReportMetric(100*quantile(variants[1].cpu, .5)/quantile(variants[2].cpu, .5), "auth-%-of-open")
}

// BenchmarkHandler measures a request to the gateway without a connection.
func BenchmarkHandler(b *testing.B) {
	s := New(b, func(o *Setup) { o.Log, o.Sandboxes = slog.New(slog.DiscardHandler), helloSandboxes{} })
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

// discard is a ResponseWriter that discards the body.
type discard struct {
	header http.Header
	status int
}

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) WriteHeader(status int)      { d.status = status }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
