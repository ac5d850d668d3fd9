package control

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// listen returns a listener on a Unix socket, which takes the place of the socket of QEMU, and its path.
func listen(t *testing.T) (net.Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

// connect returns a client and the guest's end of its connection.
func connect(t *testing.T) (*Client, net.Conn) {
	t.Helper()
	l, path := listen(t)
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		guest.Close()
	})
	return c, guest
}

// TestAwaitPortalEnds waits for a portal that is never ready, and for one of a guest that says that it has none.
func TestAwaitPortalEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		resp  Response
		after time.Duration // the time limit of the call
		want  string
	}{
		"never ready": {Response{}, time.Minute, context.DeadlineExceeded.Error()},
		"none":        {Response{Error: "there is none"}, time.Hour, "there is none"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, guest := net.Pipe()
				c := newClient(host)
				served := make(chan error)
				go func() {
					served <- Serve(guest, func(Request) Response {
						time.Sleep(PortalWait)
						return tt.resp
					})
				}()
				ctx, cancel := context.WithTimeout(t.Context(), tt.after)
				defer cancel()
				if err := c.AwaitPortal(ctx); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
				c.Close()
				<-served
			})
		})
	}
}

// TestBadRequests sends fields that are not valid. The client does not send them, the guest refuses them, and no error has
// the token.
func TestBadRequests(t *testing.T) {
	const token = "0f0f0f0f0f0f0f0f"
	for name, req := range map[string]Request{
		"a short seed":          {Seed: []byte("seed")},
		"a long seed":           {Seed: make([]byte, SeedSize+1)},
		"a short token":         {Token: token},
		"a token with a line":   {Token: strings.Repeat(token, 4)[:63] + "\n"},
		"a long hostname":       {Hostname: strings.Repeat("x", maxHostname+1)},
		"two lines of hosts":    {Hostname: "a\n127.0.0.1"},
		"a hyphen at the start": {Hostname: "-a"},
		"a hyphen at the end":   {Hostname: "a-"},
		"a domain":              {Hostname: "a.b"},
		"another alphabet":      {Hostname: "ä"},
		"a bad and a good one":  {Adjust: 1, Hostname: "a", Token: token},
	} {
		t.Run(name, func(t *testing.T) {
			c, guest := connect(t)
			if _, err := c.exchange(t.Context(), req); err == nil || strings.Contains(err.Error(), token) {
				t.Errorf("the client sends it, or has the error %v", err)
			}
			served := make(chan error)
			go func() {
				served <- Serve(guest, func(req Request) Response {
					t.Errorf("handled %+v", req)
					return Response{}
				})
			}()
			req.ID = 7
			line, err := encode(req)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.conn.Write(line); err != nil {
				t.Fatal(err)
			}
			resp, err := readResponse(&c.lines)
			if err != nil || resp.ID != 7 || resp.Error == "" || strings.Contains(resp.Error, token) {
				t.Errorf("the guest responds %+v, %v", resp, err)
			}
			c.Close()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
	c, _ := connect(t)
	if c.Personalize(t.Context(), nil, strings.Repeat("0f", 32)) == nil || c.Personalize(t.Context(), make([]byte, SeedSize), "") == nil ||
		c.SetHostname(t.Context(), "") == nil {
		t.Error("a client sends a request without what it sets")
	}
}

// TestAnyTime synchronizes the clocks of guests that say the most extreme times.
func TestAnyTime(t *testing.T) {
	for _, ns := range []int64{0, -1, 1<<63 - 1, -1 << 63} {
		c, guest := connect(t)
		if err := syncClock(t, c, guest, func(Request) Response { return Response{Time: ns} }); err != nil {
			t.Errorf("time %d: %v", ns, err)
		}
	}
}

// TestServe sends requests over connections that an earlier client has left in disorder, in pieces, and too long ones.
func TestServe(t *testing.T) {
	handle := func(req Request) Response { return Response{Time: req.Adjust + 1} }
	for name, tt := range map[string]struct {
		send []string
		want string
		err  error
	}{
		"the rest of a line": {[]string{`,"adjust":5}` + "\n" + `{"id":2}` + "\n"}, `{"id":2,"time":1}` + "\n", nil},
		"pieces":             {[]string{`{"id":2,`, `"adjust":-7}`, "\n", `{"id":3}` + "\n{"}, `{"id":2,"time":-6}` + "\n" + `{"id":3,"time":1}` + "\n", nil},
		"the largest id":     {[]string{`{"id":18446744073709551615,"later":true}` + "\n"}, `{"id":18446744073709551615,"time":1}` + "\n", nil},
		"a long line":        {[]string{strings.Repeat(" ", maxLine) + `{"id":2}` + "\n"}, "", errLongLine},
	} {
		t.Run(name, func(t *testing.T) {
			c, guest := connect(t)
			served := make(chan error)
			go func() {
				err := Serve(guest, handle)
				guest.Close()
				served <- err
			}()
			for _, s := range tt.send {
				if _, err := io.WriteString(c.conn, s); err != nil {
					t.Error(err)
				}
			}
			if err := c.conn.(*net.UnixConn).CloseWrite(); err != nil && tt.err == nil {
				t.Error(err)
			}
			got, err := io.ReadAll(c.conn)
			if string(got) != tt.want || err != nil && tt.err == nil {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
			if err := <-served; !errors.Is(err, tt.err) {
				t.Errorf("Serve returned %v, want %v", err, tt.err)
			}
		})
	}
}

// TestServeDoesNotWaitForReaders checks that Serve gives up a host that reads no responses.
func TestServeDoesNotWaitForReaders(t *testing.T) {
	t.Parallel()
	c, guest := connect(t)
	served := make(chan error)
	go func() { served <- Serve(guest, func(Request) Response { return Response{} }) }()
	go func() {
		for {
			if _, err := io.WriteString(c.conn, `{"id":1}`+"\n"); err != nil {
				return
			}
		}
	}()
	if err := <-served; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Serve returned %v, want %v", err, os.ErrDeadlineExceeded)
	}
}
