package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

var numberedGroup = regexp.MustCompile(`/processes/[0-9]+`)

// testPortal runs containers whose main process is the portal, as root and as another user. The portal starts each program
// in a cgroup of its own, which the agent lets it create.
func testPortal(t *testing.T, g *guest) {
	ctx := t.Context()
	for _, uid := range []uint32{0, 1000} {
		id := fmt.Sprintf("portal%d", uid)
		spec := buildRoot(t, g, id)
		spec.Process.Args = []string{"/.msb/portal", "serve"}
		spec.Process.User.UID = uid
		ok(t)(g.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}))
		ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}))
		connect := tool()
		connect.Args, connect.User.UID = []string{"/.msb/portal", "connect"}, uid
		g.exec(t, id, "connect", connect)
		conn, err := grpc.NewClient("passthrough:///portal", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				return &execConn{ctx: ctx, guest: g, container: id, exec: "connect"}, nil
			}))
		if err != nil {
			t.Fatal(err)
		}
		client := portalv1.NewProcessServiceClient(conn)

		for i := range 2 { // the number of a cgroup is not used again
			printed, exit := runProcess(t, client, &portalv1.StartProcessRequest{Argv: []string{"/tool", "files", "/proc/self/cgroup"}})
			if want := fmt.Sprintf(`/proc/self/cgroup: "0::/processes/%d/all\n" false`+"\n", i+1); printed != want || exit.GetExitCode() != 0 {
				t.Errorf("as user %d: exit %v, output %q, want %q", uid, exit, printed, want)
			}
		}
		printed, exit := runProcess(t, client, &portalv1.StartProcessRequest{
			Argv: []string{"/tool", "wait"}, Terminal: &portalv1.TerminalSize{}, Timeout: durationpb.New(time.Second),
		})
		if !exit.GetTimedOut() || exit.GetSignal() != 15 && exit.GetExitCode() != 2 {
			t.Errorf("as user %d: at the time limit: exit %v, output %q", uid, exit, printed)
		}
		// The cgroups of the programs that have ended are removed, and one is created for the next program.
		printed, _ = runProcess(t, client, &portalv1.StartProcessRequest{Argv: []string{"/tool", "list", "/sys/fs/cgroup/processes"}})
		if groups := numberedGroup.FindAllString(printed, -1); len(groups) == 0 || groups[0] != "/processes/4" || len(groups) > 2 {
			t.Errorf("as user %d: the cgroups are %q, want that of the fourth program, and at most one more", uid, groups)
		}
		conn.Close()
		ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))
	}
}

// runProcess runs a program and returns what it printed and its exit.
func runProcess(t *testing.T, client portalv1.ProcessServiceClient, req *portalv1.StartProcessRequest) (string, *portalv1.ProcessExit) {
	t.Helper()
	stream, err := client.StartProcess(t.Context(), req, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	var printed strings.Builder
	for {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatalf("start %q: %v", req.GetArgv(), err)
		}
		printed.Write(resp.GetEvent().GetOutput().GetData())
		if exit := resp.GetEvent().GetExit(); exit != nil {
			return printed.String(), exit
		}
	}
}

// execConn is the streams of an exec as a net.Conn without deadlines.
type execConn struct {
	ctx             context.Context
	guest           *guest
	container, exec string
	rest            []byte
}

func (c *execConn) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		resp, err := c.guest.ReadStdout(c.ctx, &pb.ReadStreamRequest{ContainerId: c.container, ExecId: c.exec, Len: 32 << 10})
		if err != nil {
			return 0, io.EOF
		}
		c.rest = resp.GetData()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *execConn) Write(p []byte) (int, error) {
	for written := 0; written < len(p); {
		resp, err := c.guest.WriteStdin(c.ctx, &pb.WriteStreamRequest{ContainerId: c.container, ExecId: c.exec, Data: p[written:]})
		if err != nil {
			return written, err
		}
		written += int(resp.GetLen())
	}
	return len(p), nil
}

func (c *execConn) Close() error {
	_, err := c.guest.CloseStdin(c.ctx, &pb.CloseStdinRequest{ContainerId: c.container, ExecId: c.exec})
	return err
}

func (c *execConn) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (c *execConn) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (c *execConn) SetDeadline(time.Time) error      { return nil }
func (c *execConn) SetReadDeadline(time.Time) error  { return nil }
func (c *execConn) SetWriteDeadline(time.Time) error { return nil }
