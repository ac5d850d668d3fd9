package portalclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script is what a portal responds to every call except Ping.
type script struct {
	contract uint32
	messages [][]byte
	err      error
	readAll  bool // respond after the last message of the request, not after the first
	hangs    bool // it ends only with the call
	offers   bool // send the header, which offers a transfer, before the rest of the request comes
	// asked, if it is not nil, gets the first message of each request.
	asked func(message []byte)
}

// scriptOf returns a script with the given messages.
func scriptOf(contract uint32, err error, messages ...proto.Message) script {
	s := script{contract: contract, err: err}
	for _, m := range messages {
		data, _ := proto.Marshal(m)
		s.messages = append(s.messages, data)
	}
	return s
}

// serve responds to a call of any method.
func (s script) serve(_ any, stream grpc.ServerStream) error {
	var request []byte
	if err := stream.RecvMsg(&request); err != nil && err != io.EOF {
		return err
	}
	if method, _ := grpc.MethodFromServerStream(stream); method == portalv1.PortalService_Ping_FullMethodName {
		ping, _ := proto.Marshal(&portalv1.PingResponse{Contract: s.contract})
		return stream.SendMsg(&ping)
	}
	if s.asked != nil {
		s.asked(request)
	}
	if s.offers {
		if err := stream.SendHeader(nil); err != nil {
			return err
		}
	}
	for s.readAll && stream.RecvMsg(&request) == nil {
	}
	if s.hangs {
		<-stream.Context().Done()
	}
	for _, m := range s.messages {
		if err := stream.SendMsg(&m); err != nil {
			return err
		}
	}
	return s.err
}

// rawCodec passes messages as the bytes that they are encoded to.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// connect returns a client of a portal that follows the script. No transfer can be opened.
func (s script) connect(t testing.TB) *Client {
	t.Helper()
	return s.connectWith(t, func(context.Context, string) (io.ReadWriteCloser, error) { return nil, errdefs.ErrUnavailable })
}

// connectWith returns a client of a portal that follows the script. It opens transfers with attach.
func (s script) connectWith(t testing.TB, attach sandbox.Attach) *Client {
	t.Helper()
	clientConn, portalConn := net.Pipe()
	listener := &oneConn{make(chan net.Conn, 1)}
	listener.conns <- portalConn
	server := grpc.NewServer(grpc.UnknownServiceHandler(s.serve), grpc.ForceServerCodec(rawCodec{}))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
	client, err := New(t.Context(), clientConn, attach)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// oneConn is a listener that accepts the connections in conns.
type oneConn struct{ conns chan net.Conn }

func (l *oneConn) Accept() (net.Conn, error) {
	conn, ok := <-l.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}
func (l *oneConn) Close() error   { close(l.conns); return nil }
func (l *oneConn) Addr() net.Addr { return streamAddr{} }

func failed(err error) bool {
	return errors.Is(err, sandbox.ErrRunFailed) && !errdefs.IsUnavailable(err)
}

// events of a process, as a portal sends them
var (
	eventStart  = &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Started{Started: &portalv1.ProcessStarted{Pid: 9, SkippedBytes: 3}}}
	eventOutput = &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Output{Output: &portalv1.Output{Data: []byte("x")}}}
	eventExit   = &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Exit{Exit: &portalv1.ProcessExit{ExitCode: 7}}}
)

// processScript returns a script with the events of a process.
func processScript(err error, events ...*portalv1.ProcessEvent) script {
	var messages []proto.Message
	for _, e := range events {
		messages = append(messages, &portalv1.StartProcessResponse{Event: e})
	}
	return scriptOf(2, err, messages...)
}

// TestMisbehavingPortals checks that a run or a process succeeds only if its result is the last message and the call succeeds.
// The client must not trust the portal for this.
func TestMisbehavingPortals(t *testing.T) {
	output := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{Output: &portalv1.Output{Data: []byte("x")}}}
	result := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{Result: &portalv1.CommandResult{ExitCode: 7}}}
	command := sandbox.Command{Program: "any", Timeout: time.Second}
	run := func(c *Client) (sandbox.Process, error) { return c.RunCommand(t.Context(), command) }
	process := func(c *Client) (sandbox.Process, error) {
		p, err := c.StartProcess(t.Context(), sandbox.ProcessRequest{Command: command})
		return startedFirst{p}, err
	}
	timedOut := func(err error) bool { return errors.Is(err, sandbox.ErrRunTimeout) }
	for name, c := range map[string]struct {
		call   func(*Client) (sandbox.Process, error)
		script script
		class  func(error) bool // nil if it has to print x and end with exit code 7
	}{
		"run: output and a result":                {run, scriptOf(0, nil, output, result), nil},
		"run: no result":                          {run, scriptOf(0, nil, output), failed},
		"run: no message":                         {run, scriptOf(0, nil), failed},
		"run: output after the result":            {run, scriptOf(0, nil, result, output), failed},
		"run: two results":                        {run, scriptOf(0, nil, result, result), failed},
		"run: a response without an event":        {run, scriptOf(0, nil, output, &portalv1.RunCommandResponse{}), failed},
		"run: error after the result":             {run, scriptOf(0, status.Error(codes.InvalidArgument, "no"), result), errdefs.IsInvalidArgument},
		"run: no result, error":                   {run, scriptOf(0, status.Error(codes.ResourceExhausted, "no")), errdefs.IsFailedPrecondition},
		"run: connection is lost":                 {run, scriptOf(0, status.Error(codes.Unavailable, "no")), failed},
		"run: time limit":                         {run, scriptOf(2, status.Error(codes.DeadlineExceeded, "limit"), output), timedOut},
		"process: a start, output and an exit":    {process, processScript(nil, eventStart, eventOutput, eventExit), nil},
		"process: no exit":                        {process, processScript(nil, eventStart, eventOutput), failed},
		"process: no message":                     {process, processScript(nil), failed},
		"process: no start":                       {process, processScript(nil, eventOutput, eventExit), failed},
		"process: an exit only":                   {process, processScript(nil, eventExit), failed},
		"process: two starts":                     {process, processScript(nil, eventStart, eventStart, eventExit), failed},
		"process: output after the exit":          {process, processScript(nil, eventStart, eventExit, eventOutput), failed},
		"process: an event that is none":          {process, processScript(nil, eventStart, &portalv1.ProcessEvent{}), failed},
		"process: a response without an event":    {process, processScript(nil, eventStart, nil), failed},
		"process: error after the exit":           {process, processScript(status.Error(codes.Internal, "no"), eventStart, eventExit), failed},
		"process: no such program":                {process, processScript(status.Error(codes.NotFound, "no")), func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotFound) }},
		"process: connection is lost after start": {process, processScript(status.Error(codes.Unavailable, "no"), eventStart), failed},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := sandboxtest.Read(c.call(c.script.connect(t)))
			if c.class == nil && (err != nil || r.ExitCode != 7 || r.Stdout != "x") || c.class != nil && (err == nil || !c.class(err)) {
				t.Errorf("got %+v, %v", r, err)
			}
		})
	}
}

// startedFirst is a process whose start is not returned.
type startedFirst struct{ sandbox.Process }

func (p startedFirst) Next() (sandbox.Event, error) {
	event, err := p.Process.Next()
	if _, ok := event.(sandbox.Started); ok {
		return p.Process.Next()
	}
	return event, err
}

// operation is a call of a Client that must not trust the response.
type operation struct {
	name string
	call func(context.Context, *Client) error
}

// operations are all calls except runs.
var operations = []operation{
	{"StartProcess", func(ctx context.Context, c *Client) error {
		return drain(c.StartProcess(ctx, sandbox.ProcessRequest{Command: sandbox.Command{Program: "x"}}))
	}},
	{"AttachProcess", func(ctx context.Context, c *Client) error {
		return drain(c.AttachProcess(ctx, sandbox.ProcessID{PID: 1}, sandbox.AttachOptions{Replay: true}))
	}},
	{"ListProcesses", func(ctx context.Context, c *Client) error {
		err := c.ListProcesses(ctx, func(sandbox.ProcessInfo) error { return nil })
		return err
	}},
	{"CreateContext", func(ctx context.Context, c *Client) error {
		_, err := c.CreateContext(ctx, sandbox.ContextRequest{Language: sandbox.Python})
		return err
	}},
	{"ListContexts", func(ctx context.Context, c *Client) error {
		_, err := c.ListContexts(ctx)
		return err
	}},
	{"RestartContext", func(ctx context.Context, c *Client) error {
		_, err := c.RestartContext(ctx, "x", sandbox.Environment{})
		return err
	}},
	{"RemoveContext", func(ctx context.Context, c *Client) error { return c.RemoveContext(ctx, "x") }},
	{"WriteInput", func(ctx context.Context, c *Client) error {
		return c.WriteInput(ctx, sandbox.ProcessID{PID: 1}, strings.NewReader("x"), true)
	}},
	{"SignalProcess", func(ctx context.Context, c *Client) error {
		return c.SignalProcess(ctx, sandbox.ProcessID{PID: 1}, 15, false)
	}},
	{"ResizeTerminal", func(ctx context.Context, c *Client) error {
		return c.ResizeTerminal(ctx, sandbox.ProcessID{Tag: "x"}, sandbox.TerminalSize{Columns: 80, Rows: 24})
	}},
	{"StatFile", func(ctx context.Context, c *Client) error {
		_, err := c.StatFile(ctx, sandbox.Path{Path: "x"}, true)
		return err
	}},
	{"ListFiles", func(ctx context.Context, c *Client) error {
		return c.ListFiles(ctx, sandbox.Path{Path: "x"}, 1, func(sandbox.FileInfo) error { return nil })
	}},
	{"ReadFile", func(ctx context.Context, c *Client) error {
		_, data, err := c.ReadFile(ctx, sandbox.Path{Path: "x"}, 0, -1)
		return discard(data, err)
	}},
	{"WriteFile", func(ctx context.Context, c *Client) error {
		_, _, err := c.WriteFile(ctx, sandbox.Path{Path: "x"}, sandbox.WriteOptions{}, strings.NewReader("x"))
		return err
	}},
	{"MakeDirectory", func(ctx context.Context, c *Client) error {
		_, _, err := c.MakeDirectory(ctx, sandbox.Path{Path: "x"}, nil)
		return err
	}},
	{"MoveFile", func(ctx context.Context, c *Client) error {
		_, err := c.MoveFile(ctx, sandbox.Path{Path: "x"}, sandbox.Path{Path: "y"})
		return err
	}},
	{"RemoveFile", func(ctx context.Context, c *Client) error { return c.RemoveFile(ctx, sandbox.Path{Path: "x"}, true) }},
	{"ReadTree", func(ctx context.Context, c *Client) error {
		data, err := c.ReadTree(ctx, sandbox.Path{Path: "x"})
		return discard(data, err)
	}},
	{"WriteTree", func(ctx context.Context, c *Client) error {
		_, err := c.WriteTree(ctx, sandbox.Path{Path: "x"}, false, strings.NewReader("x"))
		return err
	}},
	{"WatchFiles", func(ctx context.Context, c *Client) error {
		w, err := c.WatchFiles(ctx, sandbox.Path{Path: "x"}, sandbox.WatchOptions{})
		if err != nil {
			return err
		}
		defer w.Close()
		for err == nil {
			_, err = w.Next()
		}
		return err
	}},
	{"Dial", func(ctx context.Context, c *Client) error {
		conn, err := c.Dial(ctx, sandbox.Address{Port: 1})
		if err != nil {
			return err
		}
		defer conn.Close()
		_, _ = conn.Write([]byte("x")) // fails if the other end is gone
		_ = conn.CloseWrite()
		_, err = io.Copy(io.Discard, conn)
		return err
	}},
}

func drain(p sandbox.Process, err error) error {
	_, err = sandboxtest.Read(p, err)
	return err
}

func discard(data io.ReadCloser, err error) error {
	if err != nil {
		return err
	}
	defer data.Close()
	_, err = io.Copy(io.Discard, data)
	return err
}

// Each operation translates each status of gRPC, and none of them makes a client try again.
func TestOperationErrors(t *testing.T) {
	classes := map[codes.Code]func(error) bool{
		codes.InvalidArgument: errdefs.IsInvalidArgument, codes.NotFound: errdefs.IsNotFound, codes.AlreadyExists: errdefs.IsAlreadyExists,
		codes.FailedPrecondition: errdefs.IsFailedPrecondition, codes.ResourceExhausted: errdefs.IsFailedPrecondition,
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		client := scriptOf(2, status.Error(code, "the guest says no\x1b"+strings.Repeat("x", 4<<10))).connect(t)
		for _, o := range operations {
			err := o.call(t.Context(), client)
			class := classes[code]
			switch {
			case code == codes.DeadlineExceeded:
				class = func(err error) bool { return errors.Is(err, sandbox.ErrRunTimeout) }
			case code == codes.NotFound && o.name == "StartProcess":
				class = func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotFound) }
			case code == codes.PermissionDenied && o.name == "StartProcess":
				class = func(err error) bool { return errors.Is(err, sandbox.ErrCommandNotExecutable) }
			case class == nil:
				class = failed
			}
			if err == nil || !class(err) || errdefs.IsUnavailable(err) || errdefs.IsResourceExhausted(err) ||
				len(err.Error()) > maxErrorText+100 || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("%s, status %v: error %.200q", o.name, code, err)
			}
		}
	}
	full := scriptOf(2, status.Error(codes.ResourceExhausted, "write: no space left on device")).connect(t)
	if _, _, err := full.WriteFile(t.Context(), sandbox.Path{Path: "x"}, sandbox.WriteOptions{}, strings.NewReader("x")); !errors.Is(err, sandbox.ErrSandboxFull) {
		t.Errorf("no space: error %v, want ErrSandboxFull", err)
	}
}

// The portal of an earlier version does not know the operations. The error says what to do.
func TestEarlierPortal(t *testing.T) {
	client := scriptOf(0, nil).connect(t)
	all := append(operations, operation{"RunCommand with cwd", func(ctx context.Context, c *Client) error {
		return drain(c.RunCommand(ctx, sandbox.Command{Program: "x", RunOptions: sandbox.RunOptions{Cwd: "/"}}))
	}}, operation{"RunCode with input", func(ctx context.Context, c *Client) error {
		return drain(c.RunCode(ctx, sandbox.Code{Language: sandbox.Python, RunOptions: sandbox.RunOptions{Input: []byte("x")}}))
	}})
	for _, o := range all {
		if err := o.call(t.Context(), client); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "Stop it and start it again") {
			t.Errorf("%s: error %v, want advice to start the sandbox again", o.name, err)
		}
	}
	// The portal of the version before contexts has processes.
	older := scriptOf(1, nil).connect(t)
	for _, o := range append(all, operation{"RunCode in a context", func(ctx context.Context, c *Client) error {
		return drain(c.RunCode(ctx, sandbox.Code{Context: "x"}))
	}}, operation{"RunCode with results", func(ctx context.Context, c *Client) error {
		return drain(c.RunCode(ctx, sandbox.Code{Language: sandbox.Python, Results: true}))
	}}, operation{"RunCode in Bash", func(ctx context.Context, c *Client) error {
		return drain(c.RunCode(ctx, sandbox.Code{Language: sandbox.Bash}))
	}}) {
		err := o.call(t.Context(), older)
		isNew := strings.Contains(o.name, "Context") || strings.Contains(o.name, "context") || strings.Contains(o.name, "results") || strings.Contains(o.name, "Bash")
		if refused := err != nil && strings.Contains(err.Error(), "Stop it and start it again"); refused != isNew {
			t.Errorf("%s with the contract 1: error %v, new: %t", o.name, err, isNew)
		}
	}
	// A run is canceled if its portal cannot interrupt it.
	interrupts := make(chan struct{}, 1)
	interrupts <- struct{}{}
	endless := scriptOf(2, nil)
	endless.hangs = true
	if err := drain(endless.connect(t).RunCode(t.Context(), sandbox.Code{Language: sandbox.Python, Interrupts: interrupts})); !failed(err) || !strings.Contains(err.Error(), "was canceled") {
		t.Errorf("interrupt of a run with the contract 2: error %v, want that it was canceled", err)
	}
	// Options that are empty are none.
	code := sandbox.Code{Language: sandbox.Python, RunOptions: sandbox.RunOptions{Env: []string{}, Input: []byte{}}}
	if err := drain(client.RunCode(t.Context(), code)); !failed(err) {
		t.Errorf("code without options: error %v, want that of the missing result", err)
	}
}

// What a sandbox says about files and processes is bounded, and has the ranges that callers rely on.
func TestHostileDescriptions(t *testing.T) {
	deep := &portalv1.FileInfo{}
	for range 100 {
		deep = &portalv1.FileInfo{Target: deep, Size: -1, Mode: 1 << 31, Type: 99}
	}
	client := scriptOf(2, nil, &portalv1.StatFileResponse{Info: deep}).connect(t)
	info, err := client.StatFile(t.Context(), sandbox.Path{Path: "x"}, false)
	if err != nil || info.Size != 0 || info.Mode != 0 || info.Type != sandbox.OtherFile || info.Target == nil || info.Target.Target != nil {
		t.Errorf("stat: %+v, %v", info, err)
	}

	entry := &portalv1.ListProcessesResponse{Process: &portalv1.ProcessInfo{Argv: []string{strings.Repeat("x", 32<<10)}}}
	endless := make([]proto.Message, 1000)
	for i := range endless {
		endless[i] = entry
	}
	enough, listed := errors.New("enough"), 0
	err = scriptOf(2, nil, endless...).connect(t).ListProcesses(t.Context(), func(sandbox.ProcessInfo) error {
		if listed++; listed == 3 {
			return enough
		}
		return nil
	})
	if err != enough || listed != 3 {
		t.Errorf("list that the caller ends: error %v after %d entries", err, listed)
	}

	exit := &portalv1.ProcessEvent{Event: &portalv1.ProcessEvent_Exit{Exit: &portalv1.ProcessExit{Reason: strings.Repeat("\x1b", 64<<10)}}}
	p, err := processScript(nil, eventStart, exit).connect(t).AttachProcess(t.Context(), sandbox.ProcessID{PID: 9}, sandbox.AttachOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if event, err := p.Next(); err != nil || event != (sandbox.Started{PID: 9, SkippedBytes: 3}) {
		t.Errorf("first event: %v, %v", event, err)
	}
	if event, err := p.Next(); err != nil || len(event.(sandbox.Exit).Reason) > maxErrorText+100 || strings.Contains(event.(sandbox.Exit).Reason, "\x1b") {
		t.Errorf("exit: %.200v, %v", event, err)
	}
}

// A snapshot of a process that still runs ends without an exit.
func TestSnapshot(t *testing.T) {
	for want, s := range map[error]script{io.EOF: processScript(nil, eventStart, eventOutput), sandbox.ErrRunFailed: processScript(nil)} {
		p, err := s.connect(t).AttachProcess(t.Context(), sandbox.ProcessID{PID: 9}, sandbox.AttachOptions{Replay: true, NoFollow: true})
		for err == nil {
			_, err = p.Next()
		}
		if !errors.Is(err, want) {
			t.Errorf("error %v, want %v", err, want)
		}
	}
}

// Data that fails cancels the call, so that the sandbox does not take it for complete.
func TestDataThatFails(t *testing.T) {
	broken := errors.New("the client is gone")
	s := scriptOf(2, nil, &portalv1.WriteFileResponse{})
	s.readAll = true
	client := s.connect(t)
	data := io.MultiReader(strings.NewReader("begin"), &failingReader{broken})
	if _, _, err := client.WriteFile(t.Context(), sandbox.Path{Path: "x"}, sandbox.WriteOptions{}, data); err != broken {
		t.Errorf("error %v, want that of the data", err)
	}
}

// A portal that does not know transfers to the sandbox, or does not offer one, gets the data in messages. More data than was
// announced cancels the call.
func TestUploadWithoutATransfer(t *testing.T) {
	for _, contract := range []uint32{5, 6} {
		synctest.Test(t, func(t *testing.T) { // the client waits for an offer for seconds
			var opened atomic.Int32
			s := scriptOf(contract, nil, &portalv1.WriteFileResponse{})
			s.readAll = true // so it sends no header before the end of the data
			s.asked = func(message []byte) {
				var request portalv1.WriteFileRequest
				err := proto.Unmarshal(message, &request)
				if asked := request.GetStart().GetTransfer() != ""; err != nil || asked != (contract == 6) {
					t.Errorf("contract %d: asked for a transfer: %t, error %v", contract, asked, err)
				}
			}
			client := s.connectWith(t, func(context.Context, string) (io.ReadWriteCloser, error) {
				opened.Add(1)
				return nil, errdefs.ErrUnavailable
			})
			write := func(length int64) error {
				_, _, err := client.WriteFile(t.Context(), sandbox.Path{Path: "x"}, sandbox.WriteOptions{Length: length}, bytes.NewReader(make([]byte, 5<<20)))
				return err
			}
			if err := write(5 << 20); err != nil || opened.Load() != 0 {
				t.Errorf("contract %d: error %v, %d transfers, want none", contract, err, opened.Load())
			}
			if err := write(4 << 20); contract == 6 && err != errTooLong {
				t.Errorf("with more data than announced: %v", err)
			}
		})
	}
}

// A portal may confirm a transfer to the sandbox late, for example because its host is busy.
func TestUploadThatIsConfirmedLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := scriptOf(6, nil, &portalv1.WriteFileResponse{})
		s.readAll, s.offers = true, true
		received := make(chan int64, 1)
		client := s.connectWith(t, func(context.Context, string) (io.ReadWriteCloser, error) {
			ours, portal := net.Pipe()
			go func() {
				time.Sleep(2 * attachTimeout)
				_, _ = portal.Write([]byte{0})
				n, _ := io.Copy(io.Discard, portal)
				received <- n
			}()
			return ours, nil
		})
		const length = 5 << 20
		_, _, err := client.WriteFile(t.Context(), sandbox.Path{Path: "x"}, sandbox.WriteOptions{Length: length}, bytes.NewReader(make([]byte, length)))
		if n := <-received; err != nil || n != length {
			t.Errorf("error %v, %d bytes came over the transfer, want %d", err, n, length)
		}
	})
}

type failingReader struct{ err error }

func (r *failingReader) Read([]byte) (int, error) { return 0, r.err }

// FuzzResponses sends any two messages to any operation.
func FuzzResponses(f *testing.F) {
	add := func(m proto.Message) []byte {
		data, _ := proto.Marshal(m)
		return data
	}
	info := &portalv1.FileInfo{Path: []byte("/x"), Size: 1, Target: &portalv1.FileInfo{Path: []byte("/y")}}
	for i := range operations {
		f.Add(uint8(i), add(&portalv1.StartProcessResponse{Event: eventStart}), add(&portalv1.StartProcessResponse{Event: eventExit}), uint8(0))
		f.Add(uint8(i), add(&portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Info{Info: info}}), add(&portalv1.DialResponse{Data: []byte("x")}), uint8(5))
		f.Add(uint8(i), add(&portalv1.WatchFilesResponse{Type: 1}), add(&portalv1.WatchFilesResponse{Type: 2, Info: info}), uint8(0))
		f.Add(uint8(i), add(&portalv1.ListProcessesResponse{Process: &portalv1.ProcessInfo{Pid: 1, Exit: &portalv1.ProcessExit{}}}), []byte{0xff}, uint8(1))
	}
	f.Fuzz(func(t *testing.T, number uint8, first, second []byte, code uint8) {
		o := operations[int(number)%len(operations)]
		s := script{contract: 1, messages: [][]byte{first, second}}
		if code %= 17; code != 0 {
			s.err = status.Error(codes.Code(code), string(first))
		}
		client := s.connect(t)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := o.call(ctx, client)
		if ctx.Err() != nil {
			t.Fatalf("%s does not end", o.name)
		}
		if err != nil && (errdefs.IsUnavailable(err) || len(err.Error()) > 8<<10) {
			t.Errorf("%s: error %.200q", o.name, fmt.Sprint(err))
		}
	})
}

// TestErrorTexts checks the parts of errors that users and programs rely on, whatever the portal or gRPC says.
func TestErrorTexts(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{status.Error(codes.NotFound, `program "x" not found in PATH`), `program "x" not found in PATH`},
		{status.Error(codes.NotFound, "x: file does not exist"), "x: file does not exist: command not found"}, // of an older portal
		{status.Error(codes.Unavailable, "error reading from server: EOF"), "the connection to the sandbox was lost, " +
			"for example because a program in it ended the connection. The request may have taken effect: check before you repeat it"},
	} {
		if got := startError(t.Context(), c.err); got.Error() != c.want {
			t.Errorf("%v became %q, want %q", c.err, got, c.want)
		}
	}
}
