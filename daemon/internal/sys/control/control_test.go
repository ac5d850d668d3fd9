package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
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

// clock is a guest's clock, which is ahead of the host's.
type clock struct {
	ahead   time.Duration
	adjusts []time.Duration
}

func (c *clock) handle(req Request) Response {
	if req.Adjust != 0 {
		c.ahead += time.Duration(req.Adjust)
		c.adjusts = append(c.adjusts, time.Duration(req.Adjust))
	}
	return Response{Time: time.Now().Add(c.ahead).UnixNano()}
}

// syncClock synchronizes the clock of a guest whose end of the connection Serve serves.
func syncClock(t *testing.T, c *Client, guest net.Conn, handle func(Request) Response) error {
	t.Helper()
	served := make(chan error)
	go func() { served <- Serve(guest, handle) }()
	err := c.SyncClock(t.Context())
	c.Close()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	return err
}

func TestSyncClock(t *testing.T) {
	for _, ahead := range []time.Duration{3 * time.Second, -3 * time.Second, 30 * time.Millisecond, -time.Hour, 0} {
		t.Run(ahead.String(), func(t *testing.T) {
			c, guest := connect(t)
			clock := &clock{ahead: ahead}
			if err := syncClock(t, c, guest, clock.handle); err != nil {
				t.Fatal(err)
			}
			// The socket is fast, but the test may have to wait for a processor.
			if clock.ahead.Abs() > 5*time.Millisecond || ahead != 0 && len(clock.adjusts) != 1 {
				t.Errorf("after the corrections %v, the clock is ahead by %v", clock.adjusts, clock.ahead)
			}
		})
	}
}

// TestMeasure measures clocks of guests whose requests take some time and whose responses take another.
func TestMeasure(t *testing.T) {
	const ms = time.Millisecond
	for name, tt := range map[string]struct {
		request, response []time.Duration // what each takes, and then again from the beginning
		requests          int             // want at most
		precision         time.Duration   // want
	}{
		"fast":           {[]time.Duration{ms / 2}, []time.Duration{0}, 1, ms / 4},
		"one fast":       {[]time.Duration{40 * ms, 20 * ms, ms / 5, 30 * ms}, []time.Duration{0, 70 * ms, ms / 5, 0}, 3, ms / 5},
		"slow":           {[]time.Duration{9 * ms, 8 * ms, 9 * ms}, []time.Duration{0, 0, 0}, maxExchanges, 4 * ms},
		"slow responses": {[]time.Duration{0}, []time.Duration{9 * ms, 9 * ms, 7 * ms, 8 * ms}, maxExchanges, 7 * ms / 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, guest := net.Pipe()
				c := newClient(host)
				n := 0
				served := make(chan error)
				go func() {
					served <- Serve(guest, func(Request) Response {
						time.Sleep(tt.request[n%len(tt.request)])
						now := time.Now().Add(-time.Hour)
						time.Sleep(tt.response[n%len(tt.response)])
						n++
						return Response{Time: now.UnixNano()}
					})
				}()
				ahead, precision, err := c.measure(t.Context())
				if err != nil || (ahead+time.Hour).Abs() > precision || precision != tt.precision || n > tt.requests {
					t.Errorf("measured %v ± %v, %v, after %d requests; want %v ± %v after %d", ahead, precision, err, n, -time.Hour, tt.precision, tt.requests)
				}
				c.Close()
				if err := <-served; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestLostRequests loses requests of each kind. They must be sent again with another id, and no correction may be made
// twice.
func TestLostRequests(t *testing.T) {
	t.Parallel() // each loss takes a second
	for name, lost := range map[string]func(n, corrections int, req Request) bool{
		"the first":            func(n, _ int, _ Request) bool { return n == 1 },
		"the first two":        func(n, _ int, _ Request) bool { return n <= 2 },
		"the first correction": func(_, corrections int, req Request) bool { return req.Adjust != 0 && corrections == 1 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, guest := connect(t)
			clock, ids := &clock{ahead: time.Minute}, make(map[uint64]bool)
			go func() {
				defer guest.Close()
				corrections := 0
				for lines := (&lineReader{r: guest}); ; {
					line, err := lines.next()
					if err != nil {
						return
					}
					var req Request
					if err := json.Unmarshal(line, &req); err != nil || ids[req.ID] {
						t.Errorf("request %s: %v", line, err)
					}
					ids[req.ID] = true
					if req.Adjust != 0 {
						corrections++
					}
					if lost(len(ids), corrections, req) {
						continue
					}
					resp := clock.handle(req)
					resp.ID = req.ID
					respond(t, guest, resp)
				}
			}()
			if err := c.SyncClock(t.Context()); err != nil {
				t.Fatal(err)
			}
			if clock.ahead.Abs() > 5*time.Millisecond || len(clock.adjusts) != 1 {
				t.Errorf("after the corrections %v, the clock is ahead by %v", clock.adjusts, clock.ahead)
			}
		})
	}
}

// TestLostResponse loses the response to a correction that the guest has made.
func TestLostResponse(t *testing.T) {
	t.Parallel()
	c, guest := connect(t)
	clock := &clock{ahead: -time.Minute}
	go func() {
		defer guest.Close()
		for lines := (&lineReader{r: guest}); ; {
			line, err := lines.next()
			if err != nil {
				return
			}
			var req Request
			if err := json.Unmarshal(line, &req); err != nil {
				t.Error(err)
			}
			resp := clock.handle(req)
			if resp.ID = req.ID; req.Adjust == 0 {
				respond(t, guest, resp)
			}
		}
	}()
	if err := c.SyncClock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if clock.ahead.Abs() > 5*time.Millisecond || len(clock.adjusts) != 1 {
		t.Errorf("after the corrections %v, the clock is ahead by %v", clock.adjusts, clock.ahead)
	}
}

// respond sends a response.
func respond(t *testing.T, conn net.Conn, resp Response) {
	line, err := encode(resp)
	if err != nil {
		t.Error(err)
	}
	if _, err := conn.Write(line); err != nil {
		t.Error(err)
	}
}

// TestLateResponses lets the guest send late responses to requests of an earlier client, and to requests before the last
// one. The time in them is wrong.
func TestLateResponses(t *testing.T) {
	t.Parallel()
	c, guest := connect(t)
	late := time.Now().Add(-time.Hour).UnixNano()
	respond(t, guest, Response{ID: 1, Time: late})
	respond(t, guest, Response{ID: c.id, Time: late})
	clock := &clock{}
	go func() {
		defer guest.Close()
		var first uint64
		for lines := (&lineReader{r: guest}); ; {
			line, err := lines.next()
			if err != nil {
				return
			}
			var req Request
			if err := json.Unmarshal(line, &req); err != nil {
				t.Error(err)
			}
			if first == 0 {
				first = req.ID
				continue
			}
			respond(t, guest, Response{ID: first, Time: late})
			resp := clock.handle(req)
			resp.ID = req.ID
			respond(t, guest, resp)
			first = req.ID // and once more
		}
	}()
	if err := c.SyncClock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(clock.adjusts) > 0 {
		t.Errorf("late responses made the corrections %v", clock.adjusts)
	}
}

// TestChanges makes the requests that change a guest, and that wait for its portal. The guest loses the first of each.
func TestChanges(t *testing.T) {
	t.Parallel() // each loss takes a second
	seed, token := bytes.Repeat([]byte{7}, SeedSize), strings.Repeat("0f", 32)
	for name, tt := range map[string]struct {
		call     func(context.Context, *Client) error
		want     Request
		notReady int // how many times the guest says that its portal is not ready
	}{
		"personalize": {func(ctx context.Context, c *Client) error { return c.Personalize(ctx, seed, token) }, Request{Seed: seed, Token: token}, 0},
		"hostname":    {func(ctx context.Context, c *Client) error { return c.SetHostname(ctx, "box-1") }, Request{Hostname: "box-1"}, 0},
		"portal":      {func(ctx context.Context, c *Client) error { return c.AwaitPortal(ctx) }, Request{AwaitPortal: true}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, guest := connect(t)
			var handled []Request
			served := make(chan error)
			go func() {
				_, err := (&lineReader{r: guest}).next() // lost
				if err == nil {
					err = Serve(guest, func(req Request) Response {
						handled = append(handled, req)
						return Response{Ready: req.AwaitPortal && len(handled) > tt.notReady}
					})
				}
				served <- err
			}()
			err := tt.call(t.Context(), c)
			c.Close()
			if err := errors.Join(err, <-served); err != nil {
				t.Fatal(err)
			}
			if len(handled) != tt.notReady+1 {
				t.Errorf("the guest handled %d requests, want %d", len(handled), tt.notReady+1)
			}
			for _, req := range handled {
				tt.want.ID = req.ID
				if !reflect.DeepEqual(req, tt.want) {
					t.Errorf("the guest handled %+v, want %+v", req, tt.want)
				}
			}
		})
	}
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

// TestBadGuests synchronizes the clock with guests that send something other than responses.
func TestBadGuests(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	for name, tt := range map[string]struct {
		send string // to each request, with the request's id in place of ID
		want string // in the error
	}{
		"garbage":               {"\x00\xff\x1b[2J\n", `sent no response but "\x00\xff\x1b[2J"`},
		"an empty line":         {"\n", `sent no response but ""`},
		"half a response":       {`{"id":ID,` + "\n", "sent no response"},
		"another type":          {`{"id":"ID"}` + "\n", "sent no response"},
		"a long line":           {long + "\n", errLongLine.Error()},
		"a line without an end": {long + long, errLongLine.Error()},
		"other responses":       {strings.Repeat(`{"id":7}`+"\n", 1000), "responses to other requests"},
		"a long error":          {`{"id":ID,"error":"` + long[:4000] + `"}` + "\n", `the guest says "xxx`},
		"a control character":   {`{"id":ID,"error":"\u001b[2J"}` + "\n", `the guest says "\x1b[2J"`},
	} {
		t.Run(name, func(t *testing.T) {
			c, guest := connect(t)
			go func() {
				lines := &lineReader{r: guest}
				line, err := lines.next()
				var req Request
				if err != nil || json.Unmarshal(line, &req) != nil {
					t.Errorf("request %q: %v", line, err)
				}
				_, _ = io.WriteString(guest, strings.ReplaceAll(tt.send, "ID", fmt.Sprint(req.ID)))
			}()
			err := c.SyncClock(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 400 {
				t.Errorf("error %v, want a short one with %q", err, tt.want)
			}
		})
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

// TestSilence checks that nothing waits forever for a guest that does not respond or does not read.
func TestSilence(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*Client, net.Conn) context.Context{
		"a guest that does not respond": func(*Client, net.Conn) context.Context { return t.Context() },
		"a caller that gives up": func(*Client, net.Conn) context.Context {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			return ctx
		},
		"a deadline": func(*Client, net.Conn) context.Context {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			t.Cleanup(cancel)
			return ctx
		},
		"a guest that disconnects": func(_ *Client, guest net.Conn) context.Context {
			guest.Close()
			return t.Context()
		},
		"a guest that does not read": func(c *Client, _ net.Conn) context.Context {
			_ = c.conn.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
			if _, err := io.Copy(c.conn, zeros{}); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error(err)
			}
			return t.Context()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, guest := connect(t)
			ctx := prepare(c, guest)
			started := time.Now()
			err := c.SyncClock(ctx)
			if took := time.Since(started); err == nil || took > maxAttempts*responseTimeout+4*time.Second {
				t.Errorf("error %v after %v", err, took)
			}
			if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
				t.Errorf("error %v, want %v", err, ctx.Err())
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

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

// TestFollow checks the times of the checks, and that only changes are logged.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var output bytes.Buffer
		results := []error{nil, io.ErrClosedPipe, io.ErrUnexpectedEOF, nil, nil, io.EOF, nil}
		checked, started := 0, time.Now()
		follow(ctx, slog.New(slog.NewTextHandler(&output, nil)), func() error {
			if got, want := time.Since(started), time.Duration(checked)*30*time.Second; got != want {
				t.Errorf("check %d after %v, want %v", checked, got, want)
			}
			checked++
			if checked > len(results) {
				cancel()
				return ctx.Err() // not logged
			}
			return results[checked-1]
		})
		const failed, works = `level=WARN msg="could not check the guest's clock" err=`, `level=INFO msg="the guest's clock is checked again"`
		var lines []string
		for line := range strings.Lines(output.String()) {
			_, line, _ = strings.Cut(strings.TrimSpace(line), " ")
			lines = append(lines, line)
		}
		want := []string{failed + `"io: read/write on closed pipe"`, works, failed + "EOF", works}
		if strings.Join(lines, "\n") != strings.Join(want, "\n") {
			t.Errorf("logged %q, want %q", lines, want)
		}
	})
}

// TestFollowConnects lets Follow correct a guest's clock. Follow must disconnect after that.
func TestFollowConnects(t *testing.T) {
	l, path := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Follow(ctx, path, slog.New(slog.DiscardHandler))
	}()
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	clock := &clock{ahead: time.Hour}
	if err := Serve(guest, clock.handle); err != nil {
		t.Error(err)
	}
	if clock.ahead.Abs() > 5*time.Millisecond {
		t.Errorf("the clock is ahead by %v", clock.ahead)
	}
	cancel()
	<-done
}

// FuzzResponses reads what a guest sends, in pieces of every size.
func FuzzResponses(f *testing.F) {
	for _, s := range []string{
		`{"id":1,"time":1764633600000000000}` + "\n", `{"id":1,"error":"no"}` + "\n\n" + `{"id":18446744073709551615}` + "\n", "\n", "null\n[1]\n{",
		`{"id":1,"id":2,"ID":3}` + "\n", `{"id":-1}` + "\n", `{"time":1e400}` + "\n", strings.Repeat("[", 5000), strings.Repeat(" ", maxLine-1) + "\n",
	} {
		f.Add([]byte(s), uint16(3))
	}
	f.Fuzz(func(t *testing.T, sent []byte, size uint16) {
		r := &pieces{sent, int(size%maxLine) + 1}
		lines := &lineReader{r: r}
		var got []byte
		var err error
		for err == nil {
			var line []byte
			if line, err = lines.next(); err == nil {
				if got = append(append(got, line...), '\n'); len(line) >= maxLine {
					t.Fatalf("a line has %d bytes", len(line))
				}
			}
		}
		// The lines are what was sent, up to the first line that is too long or has no end.
		rest := sent[len(got):]
		if end := bytes.IndexByte(rest, '\n'); !bytes.HasPrefix(sent, got) || end >= 0 && end < maxLine || len(rest) >= maxLine != errors.Is(err, errLongLine) {
			t.Fatalf("read %q, %v, want the lines of %q", got, err, sent)
		}
		lines = &lineReader{r: &pieces{sent, int(size%maxLine) + 1}}
		for {
			resp, err := readResponse(lines)
			if errors.Is(err, errLongLine) || errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				if len(err.Error()) > 1000 {
					t.Fatalf("an error of %d bytes", len(err.Error()))
				}
				continue
			}
			line, err := encode(resp)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := readResponse(&lineReader{r: bytes.NewReader(line)}); again != resp || err != nil && len(line) <= maxLine {
				t.Fatalf("%+v is %+v after it was encoded and decoded, %v", resp, again, err)
			}
		}
	})
}

// pieces reads data in pieces of size bytes.
type pieces struct {
	data []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.data) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.data[:min(p.size, len(p.data))])
	p.data = p.data[n:]
	return n, nil
}
