package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

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
