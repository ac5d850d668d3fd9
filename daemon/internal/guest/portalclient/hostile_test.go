package portalclient_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// guest is one connection of a portal that speaks HTTP/2 frame by frame, so that it can send anything.
type guest struct {
	conn io.ReadWriteCloser

	mu     sync.Mutex // for writes
	framer *http2.Framer
	buf    [16 << 10]byte
}

// attack is what a guest does instead of responding to a call in the given stream.
type attack func(g *guest, stream uint32)

// serve answers pings. It passes each other call to next, or responds as to a command that prints "fine" if next returns
// nil.
func serve(conn io.ReadWriteCloser, next func() attack) {
	defer conn.Close()
	g := &guest{conn: conn, framer: http2.NewFramer(conn, conn)}
	g.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	var attacks sync.WaitGroup
	defer attacks.Wait()
	defer conn.Close()
	write := func(f func() error) {
		g.mu.Lock()
		defer g.mu.Unlock()
		_ = f()
	}
	// In goroutines, because the client may write while it does not read, and a pipe has no buffer.
	background := func(f func()) { attacks.Go(f) }
	background(func() { write(func() error { return g.framer.WriteSettings() }) })
	paths := map[uint32]string{}
	for {
		frame, err := g.framer.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				background(func() { write(g.framer.WriteSettingsAck) })
			}
		case *http2.PingFrame:
			if data := frame.Data; !frame.IsAck() {
				background(func() { write(func() error { return g.framer.WritePing(true, data) }) })
			}
		case *http2.MetaHeadersFrame:
			paths[frame.StreamID] = frame.PseudoValue("path")
		case *http2.DataFrame:
			stream := frame.StreamID
			if n := uint32(len(frame.Data())); n > 0 { // or the client may send no more over this connection
				background(func() { write(func() error { return g.framer.WriteWindowUpdate(0, n) }) })
			}
			path, first := paths[stream]
			delete(paths, stream)
			if !first {
				continue
			}
			if strings.HasSuffix(path, "/Ping") {
				background(func() {
					g.headers(stream, false, ":status", "200", "content-type", "application/grpc")
					g.message(stream, &portalv1.PingResponse{Contract: 1})
					g.headers(stream, true, "grpc-status", "0")
				})
			} else if a := next(); a != nil {
				background(a.of(g, stream))
			} else {
				background(begun(func(g *guest, stream uint32) {
					g.output(stream, []byte("fine\n"))
					g.message(stream, &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{Result: &portalv1.CommandResult{}}})
					g.headers(stream, true, "grpc-status", "0")
				}).of(g, stream))
			}
		}
	}
}

// headers sends a block of headers, given as names and values, in as many frames as it needs.
func (g *guest) headers(stream uint32, end bool, fields ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var parts []io.Reader
	for i := 0; i < len(fields); i += 2 {
		name, size, value := fields[i], len(fields[i+1]), io.Reader(strings.NewReader(fields[i+1]))
		if fields[i+1] == hugeText {
			size, value = hugeSize, io.LimitReader(xs{}, hugeSize)
		}
		literal := append([]byte{0, byte(len(name))}, name...) // neither indexed nor compressed (RFC 7541, section 6.2.2)
		if size < 0x7f {
			literal = append(literal, byte(size))
		} else {
			literal = binary.AppendUvarint(append(literal, 0x7f), uint64(size-0x7f))
		}
		parts = append(parts, bytes.NewReader(literal), value)
	}
	block := io.MultiReader(parts...)
	next := func() (part []byte, last bool) {
		n, err := io.ReadFull(block, g.buf[:])
		return g.buf[:n], err != nil
	}
	part, last := next()
	err := g.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: part, EndStream: end, EndHeaders: last})
	for err == nil && !last {
		part, last = next()
		err = g.framer.WriteContinuation(stream, last, part)
	}
}

func (g *guest) message(stream uint32, m proto.Message) {
	data, _ := proto.Marshal(m)
	g.data(stream, append([]byte{0, byte(len(data) >> 24), byte(len(data) >> 16), byte(len(data) >> 8), byte(len(data))}, data...))
}

func (g *guest) output(stream uint32, data []byte) {
	g.message(stream, &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{Output: &portalv1.Output{Data: data}}})
}

func (g *guest) data(stream uint32, data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.framer.WriteData(stream, false, data)
}

func (g *guest) raw(data []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, _ = g.conn.Write(data)
}

// hugeText stands for a header value of hugeSize bytes. A real one would be counted as msbd's memory.
const (
	hugeText = "<huge>"
	hugeSize = 15e6
)

var longText = strings.Repeat("x", 30e3)

// xs is an endless reader of the letter x.
type xs struct{}

func (xs) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// trailersOnly responds with nothing but a status.
func trailersOnly(code int, text string) attack {
	return func(g *guest, stream uint32) {
		g.headers(stream, true, ":status", "200", "content-type", "application/grpc", "grpc-status", strconv.Itoa(code), "grpc-message", text)
	}
}

// begun sends output first, so that the run has begun.
func begun(a attack) attack {
	return func(g *guest, stream uint32) {
		g.headers(stream, false, ":status", "200", "content-type", "application/grpc")
		g.output(stream, []byte("begun\n"))
		a(g, stream)
	}
}

// of returns a function that makes the attack.
func (a attack) of(g *guest, stream uint32) func() { return func() { a(g, stream) } }

func attacks() map[string]attack {
	all := map[string]attack{
		"huge trailers after output": begun(func(g *guest, stream uint32) {
			g.headers(stream, true, "grpc-status", "13", "grpc-message", hugeText)
		}),
		"huge other trailer": begun(func(g *guest, stream uint32) { g.headers(stream, true, "grpc-status", "0", "x", hugeText) }),
		"huge headers":       func(g *guest, stream uint32) { g.headers(stream, false, ":status", "200", "x", hugeText) },
		"status details": func(g *guest, stream uint32) {
			g.headers(stream, true, ":status", "200", "content-type", "application/grpc", "grpc-status", "8", "grpc-status-details-bin", longText)
		},
		"HTTP status 500":    func(g *guest, stream uint32) { g.headers(stream, true, ":status", "500", "content-type", "text/html") },
		"control characters": trailersOnly(13, "%1b[2J%0a%00%ff%e2%80%ae\x1b"),
		"no status":          begun(func(g *guest, stream uint32) { g.headers(stream, true, "x", "y") }),
		"unknown content type": func(g *guest, stream uint32) {
			g.headers(stream, true, ":status", "200", "content-type", longText)
		},
		"message of 2 GiB":     begun(func(g *guest, stream uint32) { g.data(stream, []byte{0, 0x7f, 0xff, 0xff, 0xff, 1}) }),
		"message of 1 MiB":     begun(func(g *guest, stream uint32) { g.data(stream, []byte{0, 0, 0x10, 0, 0, 1}) }),
		"compressed message":   begun(func(g *guest, stream uint32) { g.data(stream, []byte{1, 0, 0, 0, 1, 1}) }),
		"message that is none": begun(func(g *guest, stream uint32) { g.data(stream, []byte{0, 0, 0, 0, 3, 0xff, 0xff, 0xff}) }),
		"garbage":              begun(func(g *guest, _ uint32) { g.raw([]byte(strings.Repeat("\xde\xad\xbe\xef", 1000))) }),
		"close":                begun(func(g *guest, _ uint32) { g.conn.Close() }),
		"close at once":        func(g *guest, _ uint32) { g.conn.Close() },
		"too much data": begun(func(g *guest, stream uint32) {
			for range 100 { // more than both windows, in one message
				g.data(stream, make([]byte, 16<<10))
			}
		}),
		"window update of 0": begun(func(g *guest, stream uint32) { g.raw([]byte{0, 0, 4, 8, 0, 0, 0, 0, byte(stream), 0, 0, 0, 0}) }),
		"window overflow": begun(func(g *guest, stream uint32) {
			g.raw([]byte{0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff})
			g.conn.Close()
		}),
		"frame that is too long": begun(func(g *guest, stream uint32) { g.raw([]byte{0xff, 0xff, 0xff, 0, 0, 0, 0, 0, byte(stream)}) }),
		"unknown frames": begun(func(g *guest, stream uint32) {
			for range 50 {
				g.raw([]byte{0, 0, 1, 0xee, 0, 0, 0, 0, 0, 1})
			}
			g.conn.Close()
		}),
	}
	for code := range 18 { // one more than gRPC has
		all[fmt.Sprint("status ", code)] = trailersOnly(code, "the guest says no")
		all[fmt.Sprint("huge status ", code)] = trailersOnly(code, hugeText)
	}
	for code := range 14 {
		all[fmt.Sprint("reset ", code)] = begun(func(g *guest, stream uint32) {
			g.mu.Lock()
			defer g.mu.Unlock()
			_ = g.framer.WriteRSTStream(stream, http2.ErrCode(code))
		})
		all[fmt.Sprint("go away ", code)] = begun(func(g *guest, stream uint32) {
			g.mu.Lock()
			defer g.mu.Unlock()
			_ = g.framer.WriteGoAway(0, http2.ErrCode(code), []byte(longText[:16<<10]))
		})
	}
	return all
}

// hostileRuntime is a Runtime whose microVMs have a hostile portal.
type hostileRuntime struct {
	*sandboxtest.Runtime
	serving sync.WaitGroup

	mu   sync.Mutex
	next attack // for the next run only
}

func (r *hostileRuntime) Attach(ctx context.Context, id, _ string) (io.ReadWriteCloser, error) {
	host, portal := net.Pipe()
	r.serving.Go(func() {
		serve(portal, func() attack {
			r.mu.Lock()
			defer r.mu.Unlock()
			a := r.next
			r.next = nil
			return a
		})
	})
	return host, nil
}

// attackNext sets the attack for the next call. It reports whether the one before was not made.
func (r *hostileRuntime) attackNext(a attack) (left bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	left = r.next != nil
	r.next = a
	return left
}

// newHostile returns the real gateway, methods, domain and portal client, in front of a hostile portal. The sandbox "a"
// runs.
func newHostile(t *testing.T) (*servetest.Site, *sandbox.Manager, *hostileRuntime) {
	rt := &hostileRuntime{Runtime: sandboxtest.NewRuntime()}
	t.Cleanup(rt.serving.Wait)
	var log servetest.LogBuffer
	m := sandbox.NewManager(sandbox.Options{
		Store: sandboxtest.NewMemoryStore(), Runtime: rt,
		Connect: func(ctx context.Context, stream io.ReadWriteCloser, attach sandbox.Attach) (sandbox.Portal, error) {
			c, err := portalclient.New(ctx, stream, attach)
			if err != nil {
				return nil, err
			}
			return c, nil
		},
		Defaults:   sandbox.Config{Template: sandbox.Template{Image: "default", CPUs: 1, MemoryMiB: 512}},
		Quota:      func(string) sandbox.Quota { return sandbox.Quota{} },
		CheckSpace: func(uint64) error { return nil }, MakeRoom: func() bool { return false }, Boots: 8,
		HostMemory: func() (available, total uint64, err error) { return 1 << 40, 1 << 40, nil },
		MaxCPUs:    4, MaxMemoryMiB: 4096, StartTimeout: time.Minute, MaxRunTime: time.Minute,
		Log: bounded.NewLogger(&log, false, nil),
	})
	if _, err := m.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	s := servetest.New(t, func(o *servetest.Setup) { o.Sandboxes = m })
	servetest.WantOK(t, s.Post(servetest.Request(rpc.MethodSandboxStart, `{"sandbox":"a"}`)))
	return s, m, rt
}

var runTrue = servetest.Request(rpc.MethodSandboxCommandRun, `{"sandbox":"a","command":"true"}`)

// operations are calls of each form, other than runs: with one response, with a stream of responses, with a stream of
// requests, and with both.
var operations = map[string]func(context.Context, *sandbox.Manager) error{
	"stat": func(ctx context.Context, m *sandbox.Manager) error {
		_, err := m.StatFile(ctx, hostileName, sandbox.Path{Path: "/x"}, true)
		return err
	},
	"list": func(ctx context.Context, m *sandbox.Manager) error {
		return m.ListFiles(ctx, hostileName, sandbox.Path{Path: "/x"}, 1, func(sandbox.FileInfo) error { return nil })
	},
	"read": func(ctx context.Context, m *sandbox.Manager) error {
		_, data, err := m.ReadFile(ctx, hostileName, sandbox.Path{Path: "/x"}, 0, -1)
		if err != nil {
			return err
		}
		defer data.Close()
		_, err = io.Copy(io.Discard, data)
		return err
	},
	"write": func(ctx context.Context, m *sandbox.Manager) error {
		_, _, err := m.WriteFile(ctx, hostileName, sandbox.Path{Path: "/x"}, sandbox.WriteOptions{}, strings.NewReader(longText))
		return err
	},
	"dial": func(ctx context.Context, m *sandbox.Manager) error {
		conn, err := m.Dial(ctx, hostileName, sandbox.Address{Port: 80})
		if err != nil {
			return err
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, longText) // the attack may have ended the connection
		_ = conn.CloseWrite()
		_, err = io.Copy(io.Discard, conn)
		return err
	},
}

var hostileName = sandbox.Name{Namespace: "default", Name: "a"}

// memoryBytes returns how much memory the Go runtime holds from the operating system.
func memoryBytes() int {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return int(samples[0].Value.Uint64() - samples[1].Value.Uint64())
}

// Whatever a portal sends, the client gets a short error that does not make it send the run again, unless nothing was
// sent. The log stays short, the memory stays small, and the next run works.
func TestHostilePortals(t *testing.T) {
	s, m, rt := newHostile(t)
	debug.FreeOSMemory()
	before := memoryBytes()
	rounds := 1
	if os.Getenv("MSB_SOAK") != "" {
		rounds = 100
	}
	for range rounds {
		testAttacks(t, s, m, rt)
	}
	if grown := memoryBytes() - before; grown > 16<<20 {
		t.Errorf("memory grew by %d MiB, want at most 16", grown>>20)
	} else {
		t.Logf("memory grew by %d KiB", grown>>10)
	}
}

// testAttacks makes each attack once, and then one attack in several runs at the same time.
func testAttacks(t *testing.T, s *servetest.Site, m *sandbox.Manager, rt *hostileRuntime) {
	for name, a := range attacks() {
		s.Log.Reset()
		for operation, call := range operations {
			var attacked sync.WaitGroup
			attacked.Add(1)
			rt.attackNext(func(g *guest, stream uint32) {
				defer attacked.Done()
				a(g, stream)
			})
			err := call(t.Context(), m)
			if rt.attackNext(nil) {
				attacked.Done() // the connection ended before the attack
			}
			attacked.Wait()
			if errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) || err != nil && len(err.Error()) > 5<<10 {
				t.Errorf("%s: %s: error %.300q", name, operation, err)
			}
		}
		rt.attackNext(a) // if the last one ends the connection only now, this run is lost instead
		w := s.Post(runTrue)
		body := w.Body.String()
		if w.Code == http.StatusInternalServerError || w.Code == http.StatusTooManyRequests || w.Code == http.StatusServiceUnavailable ||
			w.Header().Get("Retry-After") != "" || strings.Contains(body, "retry_after") {
			t.Errorf("%s: response is %d %v %.300s", name, w.Code, w.Header(), body)
		}
		if len(body) > 5<<10 || strings.ContainsAny(body, "\x1b\u202e\x00") {
			t.Errorf("%s: response of %d bytes: %.300q", name, len(body), body)
		}
		if log := s.Log.String(); len(log) > 4<<10 || strings.Contains(log, "ERROR") {
			t.Errorf("%s: log of %d bytes: %.300s", name, len(log), log)
		}
		rt.attackNext(nil)
		if w := s.Post(runTrue); w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "fine") {
			t.Errorf("%s: the next run: %d %.300s", name, w.Code, w.Body)
		}
	}
	var runs sync.WaitGroup
	for range 8 {
		runs.Go(func() {
			rt.attackNext(trailersOnly(13, hugeText))
			s.Post(runTrue)
		})
	}
	runs.Wait()
}

// If the guest never responds, the run ends a while after its time limit, and the client is not told to send it again. The same
// is true of a process that does not start, and of a connection.
func TestSilentPortal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m, rt := newHostile(t)
		silent := func(*guest, uint32) {}
		for name, call := range map[string]func() error{
			"start": func() error {
				_, err := m.StartProcess(t.Context(), hostileName, sandbox.ProcessRequest{Command: sandbox.Command{Program: "true"}})
				return err
			},
			"attach": func() error {
				_, err := m.AttachProcess(t.Context(), hostileName, sandbox.ProcessID{PID: 9}, sandbox.AttachOptions{})
				return err
			},
			"dial": func() error {
				_, err := m.Dial(t.Context(), hostileName, sandbox.Address{Port: 80})
				return err
			},
		} {
			rt.attackNext(silent)
			began := time.Now()
			if err := call(); !errors.Is(err, sandbox.ErrRunFailed) || !strings.Contains(err.Error(), "no longer responding") {
				t.Errorf("%s: error %v, want that the sandbox no longer responds", name, err)
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("%s: failed after %s", name, took)
			}
		}
		rt.attackNext(begun(func(*guest, uint32) {}))
		w := s.Post(runTrue)
		e := servetest.WantError(t, w, http.StatusBadGateway, rpc.CodeRunFailed)
		if e.Data == nil || e.Data.RetryAfter != 0 || !strings.Contains(e.Message, "no longer responding") {
			t.Errorf("%+v, %+v", e, e.Data)
		}
		if w := s.Post(runTrue); w.Code != http.StatusOK {
			t.Errorf("the next run: %d %s", w.Code, w.Body)
		}
	})
}
