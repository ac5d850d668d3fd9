package servetest

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/msbd/msbd/api/rpc"
)

// Listen serves the site on a loopback port. Call stop to stop the server and wait until it has stopped.
func (s *Site) Listen(t testing.TB) (addr string, stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln.Addr().String(), s.ServeOn(t, ln)
}

// ServeOn is like Listen but serves on an existing listener. stop may be called more than once.
func (s *Site) ServeOn(t testing.TB, ln net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error("serve:", err)
		}
		http.DefaultClient.CloseIdleConnections()
	})
}

// Send posts body to the JSON-RPC path at addr with the site's key. It returns the status and the body of the response.
func (s *Site) Send(t testing.TB, addr, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodPost, "http://"+addr+rpc.Path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+s.Key)
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Error("send:", err)
		return 0, ""
	}
	defer res.Body.Close()
	response, err := io.ReadAll(res.Body)
	if err != nil {
		t.Error("read response:", err)
	}
	return res.StatusCode, string(response)
}
