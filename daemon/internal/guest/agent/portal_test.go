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
// in a cgroup of its own, which the agent lets it create. request returns the request to create a container, and connect
// connects to its portal.
func testPortal(t *testing.T, g *guest, request func(id string) *pb.CreateContainerRequest, connect func(t *testing.T, id string, uid uint32) net.Conn) {
	ctx := t.Context()
	for _, uid := range []uint32{0, 1000} {
		id := fmt.Sprintf("portal%d", uid)
		req := request(id)
		req.OCI.Process.Args = []string{"/.msb/portal", "serve"}
		req.OCI.Process.User.UID = uid
		ok(t)(g.CreateContainer(ctx, req))
		ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}))
		client, hangUp := portalClient(t, connect(t, id, uid))

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
		hangUp()
		ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))
	}
}

// portalClient returns a client of the portal at the other end of conn.
func portalClient(t *testing.T, conn net.Conn) (client portalv1.ProcessServiceClient, hangUp func()) {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///portal", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return conn, nil }))
	if err != nil {
		t.Fatal(err)
	}
	return portalv1.NewProcessServiceClient(cc), func() { cc.Close() }
}

// execPortal starts `msb-portal connect` in a container and returns its streams.
func (g *guest) execPortal(t *testing.T, id string, uid uint32) net.Conn {
	t.Helper()
	connect := tool()
	connect.Args, connect.User.UID = []string{"/.msb/portal", "connect"}, uid
	g.exec(t, id, "connect", connect)
	return &execConn{ctx: t.Context(), guest: g, container: id, exec: "connect"}
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
