// Package portal is the helper inside each sandbox: it runs code and commands there for
// msbd. Serve is the container's main process, Connect the bridge over which msbd reaches it.
// Only cmd/msb-portal enters. What runs in the sandbox could speak to the portal too and gains
// nothing by it: the portal does for msbd only what every process in the sandbox can do itself.
package portal

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// Socket is where Serve listens: an abstract socket, which needs no writable file system and is
// gone with the sandbox.
const Socket = "@msb-portal"

// window is how much output may be on its way to msbd without an answer.
const window = 1 << 20

type server struct {
	portalv1.UnimplementedPortalServiceServer
	version  string
	children *children
	// null is the stdin of every process.
	null  *os.File
	repls map[portalv1.RunCodeRequest_Language]*repl
}

// Serve answers PortalService calls at socket until ctx is done, then kills what it started. It
// reaps every orphan of the pid namespace, so the process must not wait for children itself.
func Serve(ctx context.Context, socket, version string) error {
	lis, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer lis.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	// Whatever was open when the portal was started is no business of what runs here.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	children, err := adoptOrphans()
	if err != nil {
		return fmt.Errorf("adopt orphans: %w", err)
	}
	s := &server{version: version, children: children, null: null, repls: newREPLs(children, null)}
	srv := grpc.NewServer(
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
	)
	portalv1.RegisterPortalServiceServer(srv, s)
	stopped := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(stopped)
		children.kill()
		srv.Stop()
	})
	if err := srv.Serve(&newestOnly{Listener: lis}); err != nil {
		return err
	}
	<-stopped
	return nil
}

// Ping implements portalv1.PortalServiceServer.
func (s *server) Ping(context.Context, *portalv1.PingRequest) (*portalv1.PingResponse, error) {
	return &portalv1.PingResponse{Version: s.version}, nil
}

// RunCode implements portalv1.PortalServiceServer.
func (s *server) RunCode(req *portalv1.RunCodeRequest, stream grpc.ServerStreamingServer[portalv1.RunCodeResponse]) error {
	r, ok := s.repls[req.GetLanguage()]
	if !ok {
		return status.Errorf(codes.InvalidArgument, "language %v is not known", req.GetLanguage())
	}
	success, err := r.run(stream.Context(), req, func(from portalv1.Output_Stream, data []byte) error {
		return stream.Send(&portalv1.RunCodeResponse{Event: &portalv1.RunCodeResponse_Output{
			Output: &portalv1.Output{Stream: from, Data: data},
		}})
	})
	if err != nil {
		return err
	}
	return stream.Send(&portalv1.RunCodeResponse{Event: &portalv1.RunCodeResponse_Result{
		Result: &portalv1.CodeResult{Success: success},
	}})
}
