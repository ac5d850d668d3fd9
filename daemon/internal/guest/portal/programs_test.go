package portal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// theChildren returns the children of this process. There can be only one reaper.
var theChildren = sync.OnceValues(func() (*children, error) { return adoptOrphans(nil) })

// newPrograms returns programs without cgroups.
func newPrograms(t testing.TB) *programs {
	t.Helper()
	children, err := theChildren()
	if err != nil {
		t.Fatal(err)
	}
	discard, err := newDiscarder()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		children.kill()
		discard.close()
		null.Close()
	})
	return &programs{children: children, discard: discard, null: null}
}

// serveProcesses serves ProcessService and returns a client of it.
func serveProcesses(t testing.TB, s *programs) portalv1.ProcessServiceClient {
	t.Helper()
	lis := bufconn.Listen(1 << 16)
	srv := grpc.NewServer()
	portalv1.RegisterProcessServiceServer(srv, processService{programs: s})
	go func() { _ = srv.Serve(lis) }()
	conn, err := grpc.NewClient("passthrough:///portal", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return lis.Dial() }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
	})
	return portalv1.NewProcessServiceClient(conn)
}

// run runs a program to its end without reading its output.
func run(t *testing.T, s *programs, req *portalv1.StartProcessRequest) *program {
	t.Helper()
	p, r, err := s.start(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = p.follow(gone, r, func(uint64) error { return nil }, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	for !p.finished {
		p.changed.Wait()
	}
	return p
}

// TestRingsAreBounded runs programs whose ring buffers together would be larger than maxRings. Those of the programs that ended
// first are emptied, but not one that is read. When no other is left, the ring of a program that runs stays small.
func TestRingsAreBounded(t *testing.T) {
	s := newPrograms(t)
	print := &portalv1.StartProcessRequest{Argv: []string{"head", "-c", fmt.Sprint(maxRing), "/dev/zero"}}
	const most = maxRings / maxRing
	var ended []*program
	for range most {
		ended = append(ended, run(t, s, print))
	}
	if len(s.all) != most || s.rings != maxRings {
		t.Fatalf("%d programs have %d bytes, want %d with %d", len(s.all), s.rings, most, maxRings)
	}
	read := ended[0].attach(true, false)
	last := run(t, s, print)
	kept := func(p *program) bool { return len(p.ring.buf) == maxRing }
	if len(s.all) != most+1 || !kept(ended[0]) || kept(ended[1]) || !kept(ended[2]) || !kept(last) || s.rings > maxRings {
		t.Errorf("%d programs have %d bytes; the output of the one that is read is kept: %t, of the second one: %t", len(s.all), s.rings, kept(ended[0]), kept(ended[1]))
	}
	if got := ended[1].ring; got.start != maxRing || got.end != maxRing {
		t.Errorf("the ring that was emptied has the bytes from %d to %d", got.start, got.end)
	}
	for _, p := range append(ended[2:], last) {
		p.attach(true, false) // nothing can be emptied any more
	}
	small := run(t, s, print)
	if s.rings > maxRings || len(small.ring.buf) > 0 || small.printed() != maxRing {
		t.Errorf("the rings have %d bytes, of which the last program has %d; it has printed %d", s.rings, len(small.ring.buf), small.printed())
	}
	total := 0
	for _, p := range s.all {
		total += len(p.ring.buf)
	}
	if total != s.rings {
		t.Errorf("the rings have %d bytes, but %d are counted", total, s.rings)
	}
	_, err := ended[0].follow(t.Context(), read, func(uint64) error { return nil }, func(_ portalv1.Output_Stream, data []byte) error {
		total -= len(data)
		return nil
	})
	if err != nil || s.rings-total != maxRing {
		t.Errorf("the first reader got %d bytes, %v, want %d", s.rings-total, err, maxRing)
	}

	// A program with with_call has no ring.
	print.WithCall = true
	if p := run(t, s, print); p.ring.buf != nil || p.printed() != maxRing {
		t.Errorf("with with_call, the ring has %d bytes", len(p.ring.buf))
	}
}

// The exit of a program is reported only together with all of its output, whenever it ends.
func TestExitHasAllOutput(t *testing.T) {
	s := newPrograms(t)
	p, r, err := s.start(t.Context(), &portalv1.StartProcessRequest{Argv: []string{"sh", "-c", "echo first; read x; echo last"}, OpenInput: true})
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = p.follow(gone, r, func(uint64) error { return nil }, nil)
	s.mu.Lock()
	for p.printed() == 0 {
		p.changed.Wait()
	}
	s.mu.Unlock()
	logs := func(meanwhile func()) (events string) {
		err := p.sendEvents(t.Context(), p.attach(true, true), func(e *portalv1.ProcessEvent) error {
			events += string(e.GetOutput().GetData())
			if e.GetExit() != nil {
				events += "exit"
			}
			meanwhile()
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		return events
	}
	end := sync.OnceFunc(func() {
		if err := p.input.write(t.Context(), []byte("x\n"), true); err != nil {
			t.Error(err)
		}
		<-p.done
	})
	if got := logs(end); got != "first\n" && got != "first\nlast\nexit" {
		t.Errorf("the log while the program ends: %q", got)
	}
	if got := logs(func() {}); got != "first\nlast\nexit" {
		t.Errorf("the log after the end: %q", got)
	}
}

// A client that does not read delays nobody who asks for the exit or the log of a program that has ended.
func TestSlowReaderDelaysNobody(t *testing.T) {
	s := newPrograms(t)
	p, _, err := s.start(t.Context(), &portalv1.StartProcessRequest{Argv: []string{"echo", "hello"}}) // whose reader does nothing
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	p.info.Tag = "slow"
	client := serveProcesses(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for _, req := range []*portalv1.AttachProcessRequest{{NoOutput: true}, {Replay: true, NoFollow: true}} {
		req.Process = &portalv1.ProcessSelector{Tag: "slow"}
		stream, err := client.AttachProcess(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = stream.Recv()
		}
		if err != io.EOF {
			t.Errorf("%v: %v", req, err)
		}
	}
}

// Programs that belong to a call do not make the portal forget others.
func TestCallsForgetNobody(t *testing.T) {
	s := newPrograms(t)
	run(t, s, &portalv1.StartProcessRequest{Argv: []string{"true"}, Tag: "mine"})
	for i := range maxEnded + 6 {
		start := s.start
		if i%2 == 0 {
			start = s.run
		}
		p, _, err := start(t.Context(), &portalv1.StartProcessRequest{Argv: []string{"true"}, WithCall: true}) // nobody reads its output
		if err != nil {
			t.Fatal(err)
		}
		<-p.done
	}
	run(t, s, &portalv1.StartProcessRequest{Argv: []string{"true"}})
	if _, err := s.find(&portalv1.ProcessSelector{Tag: "mine"}); err != nil {
		t.Error(err)
	}
	if n := len(s.list()); n != 2+(maxEnded+6)/2 {
		t.Errorf("%d programs are listed, want those that other calls can name", n)
	}
}

// A program that has been reaped gets no signal, because the kernel may have given its pid to another process.
func TestNoSignalAfterTheEnd(t *testing.T) {
	p := run(t, newPrograms(t), &portalv1.StartProcessRequest{Argv: []string{"true"}})
	for _, send := range []func(syscall.Signal) error{p.signal, p.signalGroup, p.signalAll} {
		if err := send(syscall.SIGTERM); !errors.Is(err, errEnded) {
			t.Errorf("signal after the end: %v, want errEnded", err)
		}
	}
}

// TestNothingLeaks checks that no goroutine is left when programs of all kinds have ended.
func TestNothingLeaks(t *testing.T) {
	s := newPrograms(t)
	before := goleak.IgnoreCurrent()
	for _, req := range []*portalv1.StartProcessRequest{
		{Argv: []string{"true"}},
		{Argv: []string{"true"}, Input: make([]byte, 1<<20)}, // which it does not read
		{Argv: []string{"cat"}, Input: []byte("x")},
		{Argv: []string{"echo", "x"}, Terminal: &portalv1.TerminalSize{}, Input: []byte("x")},
		{Argv: []string{"sleep", "600"}, Timeout: durationpb.New(time.Millisecond), Grace: durationpb.New(0)},
		{Argv: []string{"sleep", "600"}, OpenInput: true, Timeout: durationpb.New(time.Millisecond)},
	} {
		run(t, s, req)
	}
	for _, req := range []*portalv1.StartProcessRequest{
		{Argv: []string{"true", "\x00"}, OpenInput: true},
		{Argv: []string{"true", "\x00"}, Terminal: &portalv1.TerminalSize{}},
	} {
		if _, _, err := s.start(t.Context(), req); err == nil {
			t.Errorf("%v was started", req)
		}
	}
	goleak.VerifyNone(t, before)
}

// FuzzProcessService sends arbitrary requests, in an arbitrary order, to the service. It only starts harmless programs. The
// service must respond to all of them, and work afterwards.
func FuzzProcessService(f *testing.F) {
	seed := func(messages ...proto.Message) {
		var data []byte
		for _, m := range messages {
			encoded, _ := proto.Marshal(m)
			for kind, example := range fuzzMessages() {
				if example.ProtoReflect().Type() == m.ProtoReflect().Type() {
					data = binary.BigEndian.AppendUint16(append(data, byte(kind)), uint16(len(encoded)))
				}
			}
			data = append(data, encoded...)
		}
		f.Add(data)
	}
	id := &portalv1.ProcessSelector{Tag: "x"}
	seed(&portalv1.StartProcessRequest{Tag: "x", OpenInput: true, Input: []byte("in")}, &portalv1.AttachProcessRequest{Process: id, Replay: true},
		&portalv1.WriteInputRequest{Process: id, Data: []byte("text"), Close: true}, &portalv1.ListProcessesRequest{})
	seed(&portalv1.StartProcessRequest{Tag: "x", Terminal: &portalv1.TerminalSize{Columns: 80}}, &portalv1.ResizeTerminalRequest{Process: id},
		&portalv1.WriteInputRequest{Process: id, Data: []byte{3, 4}}, &portalv1.SignalProcessRequest{Process: id, Signal: 9, All: true})
	seed(&portalv1.StartProcessRequest{Tag: "x", WithCall: true, User: "daemon", Cwd: "~", Env: []string{"A=1"}},
		&portalv1.AttachProcessRequest{Process: id, NoFollow: true}, &portalv1.AttachProcessRequest{Process: id, NoOutput: true})
	s := newPrograms(f)
	client := serveProcesses(f, s)
	f.Fuzz(func(t *testing.T, data []byte) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for range 20 {
			if len(data) < 3 {
				break
			}
			messages := fuzzMessages()
			m, size := messages[int(data[0])%len(messages)], int(binary.BigEndian.Uint16(data[1:]))
			data = data[3:]
			size = min(size, len(data))
			_ = proto.Unmarshal(data[:size], m)
			data = data[size:]
			fuzzCall(ctx, t, client, m)
		}
		cancel()
		p, r, err := s.start(t.Context(), &portalv1.StartProcessRequest{Argv: []string{"echo", "works"}, WithCall: true})
		if err != nil {
			t.Fatal(err)
		}
		var printed strings.Builder
		_, err = p.follow(t.Context(), r, func(uint64) error { return nil }, func(_ portalv1.Output_Stream, data []byte) error {
			printed.Write(data)
			return nil
		})
		if err != nil || printed.String() != "works\n" {
			t.Fatalf("afterwards: %v, output %q", err, printed.String())
		}
	})
}

func fuzzMessages() []proto.Message {
	return []proto.Message{
		&portalv1.StartProcessRequest{}, &portalv1.AttachProcessRequest{}, &portalv1.ListProcessesRequest{},
		&portalv1.WriteInputRequest{}, &portalv1.SignalProcessRequest{}, &portalv1.ResizeTerminalRequest{},
	}
}

// fuzzCall sends a request and reads at most a few of its responses.
func fuzzCall(ctx context.Context, t *testing.T, client portalv1.ProcessServiceClient, m proto.Message) {
	t.Helper()
	few := func(next func() error) {
		for range 3 {
			if next() != nil {
				return
			}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	switch m := m.(type) {
	case *portalv1.StartProcessRequest:
		m.Argv, m.Timeout, m.Grace = []string{"cat"}, durationpb.New(50*time.Millisecond), durationpb.New(0)
		if stream, err := client.StartProcess(ctx, m); err == nil {
			_, _ = stream.Recv()
		}
	case *portalv1.AttachProcessRequest:
		if stream, err := client.AttachProcess(ctx, m); err == nil {
			few(func() error { _, err := stream.Recv(); return err })
		}
	case *portalv1.ListProcessesRequest:
		stream, err := client.ListProcesses(ctx, m)
		for err == nil {
			_, err = stream.Recv()
		}
		if !errors.Is(err, io.EOF) {
			t.Errorf("list: %v", err)
		}
	case *portalv1.WriteInputRequest:
		if stream, err := client.WriteInput(ctx); err == nil {
			_ = stream.Send(m)
			_, _ = stream.CloseAndRecv()
		}
	case *portalv1.SignalProcessRequest:
		_, _ = client.SignalProcess(ctx, m)
	case *portalv1.ResizeTerminalRequest:
		_, _ = client.ResizeTerminal(ctx, m)
	}
}
