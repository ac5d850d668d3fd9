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
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
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

// writeCall sends a call with a key on an open connection, without reading the response.
func writeCall(conn net.Conn, key, body string) {
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s",
		rpc.Path, key, len(body), body)
}

// wantStatus reads a response from an open connection.
func wantStatus(t *testing.T, conn net.Conn, status int) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != status {
		t.Fatalf("response is %s, error %v, want status %d", res.Status, err, status)
	}
}

// blockRuns makes the runs of a Site wait. It returns a channel that gets an element when a run begins, and one of which
// each element ends a run.
func blockRuns(t *testing.T, s *Site) (began, end chan struct{}) {
	t.Helper()
	began, end = make(chan struct{}), make(chan struct{})
	s.Sandboxes.OnRun = func(ctx context.Context) error {
		began <- struct{}{}
		select {
		case <-end:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	return began, end
}

// If a request is in progress on every connection, a connection over the limit is not refused. It waits until one of the
// requests has its response, and is then served.
func TestMaxConnections(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 2 })
	began, end := blockRuns(t, s)
	addr, stop := s.Listen(t)
	defer stop()
	busy := []net.Conn{dialTest(t, addr), dialTest(t, addr)}
	for _, conn := range busy {
		writeCall(conn, s.Key, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
		<-began
	}
	third := dialTest(t, addr)
	if n := s.OpenConnections(); n != 2 {
		t.Errorf("%d connections are open, want 2", n)
	}
	fmt.Fprintf(third, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", rpc.HealthPath)
	third.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("read on the third connection: want a timeout, got:", err)
	}
	end <- struct{}{}
	wantStatus(t, third, http.StatusOK)
	third.Close()
	end <- struct{}{}
	for _, conn := range busy {
		wantStatus(t, conn, http.StatusOK)
	}
}

// A key that holds all connections does not keep others from being served, even if all of its requests are refused, and
// even if it sends halves of further requests. A connection with a request in progress is not closed.
func TestOneKeyCannotHoldAllConnections(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 10 })
	weak := s.Issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeMetrics}})
	began, end := blockRuns(t, s)
	addr, stop := s.Listen(t)
	busy := dialTest(t, addr)
	writeCall(busy, s.Key, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
	<-began
	var other []net.Conn // idle, but fewer than those of the weak key
	for range 2 {
		conn := dialTest(t, addr)
		writeCall(conn, s.Key, Request("sandbox.metrics.get", "{}"))
		wantStatus(t, conn, http.StatusOK)
		other = append(other, conn)
	}
	for i := range 50 {
		conn := dialTest(t, addr)
		writeCall(conn, weak, Request("sandbox.metrics.get", "{}"))
		wantStatus(t, conn, http.StatusForbidden)
		if i%2 == 0 {
			io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\n")
		}
		if i == 40 {
			third := dialTest(t, addr)
			writeCall(third, s.Issue(t, keys.IssueRequest{}), Request("sandbox.metrics.get", "{}"))
			wantStatus(t, third, http.StatusOK)
			other = append(other, third)
		}
	}
	if n := s.OpenConnections(); n > 10 {
		t.Errorf("%d connections are open, want at most 10", n)
	}
	for i, conn := range other {
		writeCall(conn, s.Key, Request("sandbox.metrics.get", "{}"))
		if wantStatus(t, conn, http.StatusOK); t.Failed() {
			t.Errorf("connection %d of another key was closed", i)
		}
	}
	end <- struct{}{}
	wantStatus(t, busy, http.StatusOK)
	stop()
	s.WaitForConnections()
	if n := s.ConnectionOwners(); n != 0 {
		t.Errorf("after all connections, %d keys have some", n)
	}
}

// If the limit is reached, new connections replace the oldest ones on which no valid key was sent, however long that may
// still take.
func TestNewConnectionsReplaceStrangers(t *testing.T) {
	for _, withTLS := range []bool{false, true} {
		s := New(t, func(o *Setup) { o.MaxConnections = 10 })
		s.HTTPServer().ReadHeaderTimeout, s.HTTPServer().ReadTimeout = time.Hour, time.Hour
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr, client, scheme := ln.Addr().String(), http.DefaultClient, "http://"
		if withTLS {
			ln, client = newTLS(t, ln, "h2")
			scheme = "https://"
		}
		stop := s.ServeOn(t, ln)
		send := func() {
			t.Helper()
			r, _ := http.NewRequest(http.MethodPost, scheme+addr+rpc.Path, strings.NewReader(Request("sandbox.metrics.get", "{}")))
			r.Header.Set("Content-Type", "application/json")
			r.Header.Set("Authorization", "Bearer "+s.Key)
			res, err := client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			if io.Copy(io.Discard, res.Body); res.StatusCode != http.StatusOK {
				t.Errorf("response is %s, want 200", res.Status)
			}
			res.Body.Close()
		}
		send()
		var strangers []net.Conn
		for i := range 50 {
			conn := dialTest(t, addr)
			strangers = append(strangers, conn)
			if withTLS { // what is not TLS would end the connection
				continue
			}
			io.WriteString(conn, []string{"", "POST / HTTP/1.1\r\nHost: x\r\n", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"}[i%3])
		}
		send() // on the same connection as before
		client.CloseIdleConnections()
		send() // on a new connection
		for i, conn := range strangers[:30] {
			conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("with TLS %v: old connection %d without a key is still open; %d are open", withTLS, i, s.OpenConnections())
			}
		}
		if n := s.OpenConnections(); n > 10 {
			t.Errorf("%d connections are open, want at most 10", n)
		}
		client.CloseIdleConnections()
		for _, conn := range strangers {
			conn.Close()
		}
		stop()
		s.WaitForConnections()
	}
}

// fewFilesEnv makes the test binary serve a Site.
const fewFilesEnv = "MSB_TEST_FEW_FILES"

// With a limit of 64 open files, a valid key is served at once while 1000 clients send half of a request.
func TestFewDescriptors(t *testing.T) {
	if os.Getenv(fewFilesEnv) != "" {
		s := New(t, func(o *Setup) { o.MaxConnections = 10000 })
		addr, stop := s.Listen(t)
		fmt.Printf("\nserving %s %s\n", addr, s.Key)
		io.Copy(io.Discard, os.Stdin) // until the parent has finished
		stop()
		s.WaitForConnections()
		return
	}
	t.Parallel()
	server := exec.Command("sh", "-c", `ulimit -n 64 && exec "$0" -test.run='^TestFewDescriptors$'`, os.Args[0])
	server.Env = append(os.Environ(), fewFilesEnv+"=1")
	server.Stderr = os.Stderr
	stdin, err := server.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		if err := server.Wait(); err != nil {
			t.Error("the server:", err)
		}
	}()
	var addr, key string
	for lines := bufio.NewScanner(stdout); addr == ""; {
		if !lines.Scan() {
			t.Fatal("the server did not start")
		}
		fmt.Sscanf(lines.Text(), "serving %s %s", &addr, &key)
	}
	go io.Copy(io.Discard, stdout)
	var slow []net.Conn
	for range 1000 {
		conn := dialTest(t, addr)
		slow = append(slow, conn)
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\n", rpc.Path)
	}
	began := time.Now()
	tr := newTraffic(&Site{Key: key}, addr, 1)
	defer tr.transport.CloseIdleConnections()
	for range 20 {
		tr.transport.CloseIdleConnections()
		if status, response, err := tr.send(key, Request("sandbox.metrics.get", "{}")); err != nil || status != http.StatusOK {
			t.Fatalf("a valid key: response is %d %s, error %v", status, response, err)
		}
	}
	if took := time.Since(began); took > 4*time.Second { // the timeout for headers is 5 s
		t.Errorf("20 valid calls took %s", took)
	}
	for _, conn := range slow { // the server would wait for some of them when it stops
		conn.Close()
	}
}

// Stopping the server does not wait for connections that were not accepted because of the limit.
func TestStopAtConnectionLimit(t *testing.T) {
	s := New(t, func(o *Setup) { o.MaxConnections = 1 })
	s.SetDrain(0)
	addr, stop := s.Listen(t)
	began, _ := blockRuns(t, s)
	writeCall(dialTest(t, addr), s.Key, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"1"}`))
	<-began
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
