package http_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func dialTest(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// checkHealth sends a health check on an open connection and reads the response.
func checkHealth(t *testing.T, conn net.Conn) {
	t.Helper()
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", rpc.HealthPath)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if io.Copy(io.Discard, res.Body); res.StatusCode != http.StatusOK {
		t.Fatal(res.Status)
	}
}

// A connection over the limit is not refused. It waits until another connection ends, and is then served.
func TestMaxConnections(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 2 })
	addr, stop := s.Listen(t)
	defer stop()
	first, second, third := dialTest(t, addr), dialTest(t, addr), dialTest(t, addr)
	checkHealth(t, first)
	checkHealth(t, second)
	if n := s.OpenConnections(); n != 2 {
		t.Errorf("%d connections are open, want 2", n)
	}
	fmt.Fprintf(third, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", rpc.HealthPath)
	third.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("read on the third connection: want a timeout, got:", err)
	}
	third.SetReadDeadline(time.Time{})
	first.Close()
	if res, err := http.ReadResponse(bufio.NewReader(third), nil); err != nil || res.StatusCode != http.StatusOK {
		t.Fatal("the third connection was not served after another had ended:", err)
	}
}

// Idle connections that use up the limit are closed at their timeout. Then the connections that wait are served.
func TestIdleConnectionsAreClosedForOthers(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 10 })
	s.HTTPServer().ReadHeaderTimeout = 300 * time.Millisecond
	addr, stop := s.Listen(t)
	defer stop()
	for range 20 {
		dialTest(t, addr)
	}
	if status, _ := s.Send(t, addr, Request("sandbox.metrics.get", "{}")); status != http.StatusOK {
		t.Errorf("response has status %d, want 200", status)
	}
}

// Stopping the server does not wait for connections that were not accepted because of the limit.
func TestStopAtConnectionLimit(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 1 })
	addr, stop := s.Listen(t)
	checkHealth(t, dialTest(t, addr))
	dialTest(t, addr)
	stop()
	s.WaitForConnections()
}

// newTLS wraps a listener with TLS as package daemon does. It returns the listener and a client that trusts its
// certificate. Both come from an httptest.Server, which is not used otherwise.
func newTLS(t *testing.T, ln net.Listener, protocols ...string) (net.Listener, *http.Client) {
	t.Helper()
	server := httptest.NewUnstartedServer(nil)
	server.EnableHTTP2 = len(protocols) > 0 && protocols[0] == "h2"
	server.StartTLS()
	t.Cleanup(server.Close)
	t.Cleanup(server.Client().CloseIdleConnections)
	return tls.NewListener(ln, &tls.Config{Certificates: server.TLS.Certificates, NextProtos: protocols}), server.Client()
}

func TestTLS(t *testing.T) {
	for _, c := range []struct {
		name      string
		protocols []string
		want      string
	}{{"HTTP/2", []string{"h2", "http/1.1"}, "HTTP/2.0"}, {"HTTP/1.1", []string{"http/1.1"}, "HTTP/1.1"}, {"no protocol", nil, "HTTP/1.1"}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := New(t)
			s.HTTPServer().ReadTimeout = 5 * time.Second
			var runs int
			s.Sandboxes.OnRun = func(ctx context.Context) error {
				if runs++; runs > 1 {
					return nil
				}
				select { // the first run takes longer than ReadTimeout
				case <-ctx.Done():
					return context.Cause(ctx)
				case <-time.After(6 * time.Second):
					return nil
				}
			}
			WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
			plain, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ln, client := newTLS(t, plain, c.protocols...)
			stop := s.ServeOn(t, ln)
			defer stop()
			for _, long := range []bool{false, true, false} {
				code := "1"
				if long {
					code = strings.Repeat("x", 100<<10) // so that the request and the response need many HTTP/2 frames
				}
				r, _ := http.NewRequest(http.MethodPost, "https://"+plain.Addr().String()+rpc.Path,
					strings.NewReader(Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"`+code+`"}`)))
				r.Header.Set("Content-Type", "application/json")
				r.Header.Set("Authorization", "Bearer "+s.Key)
				res, err := client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || res.StatusCode != http.StatusOK || res.Proto != c.want || !bytes.Contains(body, []byte("python: "+code)) {
					t.Errorf("response is %s %s %.100s, error %v; want %s, 200 and the code in the output", res.Proto, res.Status, body, err, c.want)
				}
			}
			// A plain HTTP request to the TLS port gets an error.
			res, err := http.Get("http://" + plain.Addr().String() + rpc.HealthPath)
			if err != nil || res.StatusCode != http.StatusBadRequest {
				t.Errorf("plain HTTP: response is %v, error %v; want status 400", res, err)
			} else {
				res.Body.Close()
			}
			client.CloseIdleConnections()
			stop()
			s.WaitForConnections()
		})
	}
}

func TestDevModeServesOnLoopbackOnly(t *testing.T) {
	for _, withTLS := range []bool{false, true} {
		for host, ok := range map[string]bool{"0.0.0.0": false, "127.0.0.1": true} {
			s := New(t, func(o *Setup) { o.Dev = true })
			plain, err := net.Listen("tcp", host+":0")
			if err != nil {
				t.Fatal(err)
			}
			ln := plain
			if withTLS {
				ln, _ = newTLS(t, plain, "h2")
			}
			if ok {
				s.ServeOn(t, ln)()
				continue
			}
			if err := s.Serve(t.Context(), ln); err == nil || !strings.Contains(err.Error(), "dev mode") {
				t.Fatal("Serve on a wildcard address in dev mode: got error:", err)
			}
			if _, err := plain.Accept(); err == nil {
				t.Error("Serve failed but left the listener open")
			}
		}
	}
}
