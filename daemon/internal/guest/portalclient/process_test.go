package portalclient

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakePortal is a portal that sends the given events for a command and returns err.
type fakePortal struct {
	portalv1.UnimplementedPortalServiceServer
	events []*portalv1.RunCommandResponse
	err    error
}

func (*fakePortal) Ping(context.Context, *portalv1.PingRequest) (*portalv1.PingResponse, error) {
	return &portalv1.PingResponse{}, nil
}

func (p *fakePortal) RunCommand(_ *portalv1.RunCommandRequest, stream portalv1.PortalService_RunCommandServer) error {
	for _, e := range p.events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return p.err
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

// TestMisbehavingPortals checks that a run succeeds only if its result is the last message and the call succeeds. The
// client must not trust the portal for this.
func TestMisbehavingPortals(t *testing.T) {
	failed := func(err error) bool { return errors.Is(err, sandbox.ErrRunFailed) && !errdefs.IsUnavailable(err) }
	output := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{Output: &portalv1.Output{Data: []byte("x")}}}
	result := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{Result: &portalv1.CommandResult{ExitCode: 7}}}
	for name, c := range map[string]struct {
		portal fakePortal
		class  func(error) bool // nil if the run has to end with exit code 7
	}{
		"output and a result":     {fakePortal{events: []*portalv1.RunCommandResponse{output, result}}, nil},
		"no result":               {fakePortal{events: []*portalv1.RunCommandResponse{output}}, failed},
		"no message":              {fakePortal{}, failed},
		"output after the result": {fakePortal{events: []*portalv1.RunCommandResponse{result, output}}, failed},
		"two results":             {fakePortal{events: []*portalv1.RunCommandResponse{result, result}}, failed},
		"error after the result":  {fakePortal{events: []*portalv1.RunCommandResponse{result}, err: status.Error(codes.InvalidArgument, "no")}, errdefs.IsInvalidArgument},
		"error without a result":  {fakePortal{err: status.Error(codes.ResourceExhausted, "no")}, failed},
		"connection is lost":      {fakePortal{err: status.Error(codes.Unavailable, "no")}, failed},
	} {
		t.Run(name, func(t *testing.T) {
			clientConn, portalConn := net.Pipe()
			listener := &oneConn{make(chan net.Conn, 1)}
			listener.conns <- portalConn
			server := grpc.NewServer()
			portalv1.RegisterPortalServiceServer(server, &c.portal)
			served := make(chan error, 1)
			go func() { served <- server.Serve(listener) }()
			defer func() {
				server.Stop()
				<-served
			}()
			client, err := New(t.Context(), clientConn)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			r, err := sandboxtest.Read(client.RunCommand(t.Context(), sandbox.Command{Program: "any"}))
			if c.class == nil && (err != nil || r.ExitCode != 7 || r.Stdout != "x") || c.class != nil && (err == nil || !c.class(err)) {
				t.Errorf("run: %+v, %v", r, err)
			}
		})
	}
}

// TestErrorTexts checks the parts of errors that users and programs rely on, whatever the portal or gRPC says.
func TestErrorTexts(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{status.Error(codes.NotFound, `program "x" not found in PATH`), `program "x" not found in PATH`},
		{status.Error(codes.NotFound, "x: file does not exist"), "x: file does not exist: command not found"}, // of an older portal
		{status.Error(codes.Unavailable, "error reading from server: EOF"), "the connection to the sandbox was lost during the run, " +
			"for example because the program ended it. The run may have taken effect: check before you repeat it"},
	} {
		if got := runError(t.Context(), c.err); got.Error() != c.want {
			t.Errorf("%v became %q, want %q", c.err, got, c.want)
		}
	}
}
