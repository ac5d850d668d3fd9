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

// ask sends a health check on an open connection and reads the answer.
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

// One connection more than the most waits until another ends; it is neither refused nor forgotten.
func TestMaxConnections(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 2 })
	addr, stop := s.Listen(t)
	defer stop()
	first, second, third := dialTest(t, addr), dialTest(t, addr), dialTest(t, addr)
	checkHealth(t, first)
	checkHealth(t, second)
	if n := s.OpenConnections(); n != 2 {
		t.Errorf("%d connections are counted", n)
	}
	fmt.Fprintf(third, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", rpc.HealthPath)
	third.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("a third connection was served:", err)
	}
	third.SetReadDeadline(time.Time{})
	first.Close()
	if res, err := http.ReadResponse(bufio.NewReader(third), nil); err != nil || res.StatusCode != http.StatusOK {
		t.Fatal("the third connection did not get its turn:", err)
	}
}

// Idle connections take all the places until they are cut; then those who wait are served.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 10 })
	s.HTTPServer().ReadHeaderTimeout = 300 * time.Millisecond
	addr, stop := s.Listen(t)
	defer stop()
	for range 20 {
		dialTest(t, addr)
	}
	if status, _ := s.Send(t, addr, Request("sandbox.metrics.get", "{}")); status != http.StatusOK {
		t.Error("answer is", status)
	}
}

// A stop does not wait for the connections that have no place.
func TestStopWhenFull(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 1 })
	addr, stop := s.Listen(t)
	checkHealth(t, dialTest(t, addr))
	dialTest(t, addr)
	stop()
	s.WaitForConnections()
}

// newTLS wraps a listener as the wiring does, and returns a client that trusts it.
func newTLS(t *testing.T, ln net.Listener, protocols ...string) (net.Listener, *http.Client) {
	t.Helper()
	certified := httptest.NewUnstartedServer(nil)
	certified.EnableHTTP2 = len(protocols) > 0 && protocols[0] == "h2"
	certified.StartTLS()
	t.Cleanup(certified.Close)
	t.Cleanup(certified.Client().CloseIdleConnections)
	return tls.NewListener(ln, &tls.Config{Certificates: certified.TLS.Certificates, NextProtos: protocols}), certified.Client()
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
				select { // the first one lasts longer than a client may take to send its request
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
					code = strings.Repeat("x", 100<<10) // many frames in, many out
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
					t.Errorf("%s %s %.100s %v", res.Proto, res.Status, body, err)
				}
			}
			// Plain HTTP to a TLS port is an error that says so.
			res, err := http.Get("http://" + plain.Addr().String() + rpc.HealthPath)
			if err != nil || res.StatusCode != http.StatusBadRequest {
				t.Errorf("plain HTTP: %v %v", res, err)
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
				t.Fatal("served on every address in dev mode:", err)
			}
			if _, err := plain.Accept(); err == nil {
				t.Error("the listener is still open")
			}
		}
	}
}
