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

// Listen serves the site on a loopback port until the returned function is called, which waits.
func (s *Site) Listen(t testing.TB) (addr string, stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln.Addr().String(), s.ServeOn(t, ln)
}

// ServeOn is Listen on a listener that there is. Its function may be called again.
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

// Send posts a body to an address, and returns the status and the body of the answer.
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
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		t.Error("read answer:", err)
	}
	return res.StatusCode, string(answer)
}
