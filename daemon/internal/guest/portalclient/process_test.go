package portalclient

import (
	"context"
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

// odd is a portal that does not keep to its contract.
type odd struct {
	portalv1.UnimplementedPortalServiceServer
	events []*portalv1.RunCommandResponse
	err    error
}

func (*odd) Ping(context.Context, *portalv1.PingRequest) (*portalv1.PingResponse, error) {
	return &portalv1.PingResponse{}, nil
}

func (o *odd) RunCommand(_ *portalv1.RunCommandRequest, stream portalv1.PortalService_RunCommandServer) error {
	for _, e := range o.events {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return o.err
}

// oneConn is a listener of one connection.
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

// What a portal says is not believed: a run has its exit only if its result came last and the call ended well.
func TestOddPortals(t *testing.T) {
	output := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Output{Output: &portalv1.Output{Data: []byte("x")}}}
	result := &portalv1.RunCommandResponse{Event: &portalv1.RunCommandResponse_Result{Result: &portalv1.CommandResult{ExitCode: 7}}}
	for name, c := range map[string]struct {
		portal odd
		class  func(error) bool // nil: exit code 7
	}{
		"as it should be":            {odd{events: []*portalv1.RunCommandResponse{output, result}}, nil},
		"no result":                  {odd{events: []*portalv1.RunCommandResponse{output}}, errdefs.IsUnavailable},
		"nothing":                    {odd{}, errdefs.IsUnavailable},
		"more after the result":      {odd{events: []*portalv1.RunCommandResponse{result, output}}, errdefs.IsUnavailable},
		"two results":                {odd{events: []*portalv1.RunCommandResponse{result, result}}, errdefs.IsUnavailable},
		"an error after the result":  {odd{events: []*portalv1.RunCommandResponse{result}, err: status.Error(codes.InvalidArgument, "no")}, errdefs.IsInvalidArgument},
		"an error without a result":  {odd{err: status.Error(codes.ResourceExhausted, "no")}, errdefs.IsResourceExhausted},
		"a status that means a loss": {odd{err: status.Error(codes.Unavailable, "no")}, errdefs.IsUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			ours, guests := net.Pipe()
			listener := &oneConn{make(chan net.Conn, 1)}
			listener.conns <- guests
			server := grpc.NewServer()
			portalv1.RegisterPortalServiceServer(server, &c.portal)
			served := make(chan error, 1)
			go func() { served <- server.Serve(listener) }()
			defer func() {
				server.Stop()
				<-served
			}()
			client, err := New(t.Context(), ours)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			r, err := sandboxtest.Read(client.RunCommand(t.Context(), sandbox.Command{Program: "any"}))
			if c.class == nil && (err != nil || r.ExitCode != 7 || r.Stdout != "x") || c.class != nil && (err == nil || !c.class(err)) {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
}
