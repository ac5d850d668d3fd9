package agent

import (
	"crypto/rand"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/guest/agent/gate"
	"github.com/msbd/msbd/daemon/internal/sys/control"
	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

// freeAddress returns an address of this machine at which nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// personalize gives the guest a seed and a new token, which it returns.
func (g *guest) personalize(t *testing.T) string {
	t.Helper()
	seed, token := make([]byte, control.SeedSize), portalport.NewToken()
	rand.Read(seed)
	g.callControl(t, func(c *control.Client) error { return c.Personalize(t.Context(), seed, token) })
	return token
}

// callControl makes a call over a new connection to the control port.
func (g *guest) callControl(t *testing.T, call func(*control.Client) error) {
	t.Helper()
	c, err := control.Dial(t.Context(), g.control)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := call(c); err != nil {
		t.Fatal(err)
	}
}

// dialPortal connects to the guest's port for the portal, as msbd does.
func (g *guest) dialPortal(t *testing.T, token string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp4", g.portal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := portalport.WriteHello(conn, portalport.Hello{Token: token}); err != nil {
		t.Fatal(err)
	}
	return conn
}

// testTemplate runs the container of a template on the disks, and makes it that of a sandbox.
func testTemplate(t *testing.T, g *guest) {
	ctx := t.Context()
	request := func(id, hostname string) *pb.CreateContainerRequest {
		req := diskContainer(id)
		req.OCI.Hostname = hostname
		req.OCI.Process.Args = []string{"/.msb/portal", "serve"}
		return req
	}
	builder := g.personalize(t)
	early := g.dialPortal(t, builder) // it waits for the container
	ok(t)(g.CreateContainer(ctx, request("template-1", "template")))
	ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "template-1"}))
	g.callControl(t, func(c *control.Client) error { return c.AwaitPortal(ctx) })
	client, hangUp := portalClient(t, early)
	defer hangUp()
	print := func(client portalv1.ProcessServiceClient, want string, args ...string) {
		t.Helper()
		printed, exit := runProcess(t, client, &portalv1.StartProcessRequest{Argv: append([]string{"/tool"}, args...)})
		if printed != want || exit.GetExitCode() != 0 {
			t.Errorf("tool %q: exit %v, output %q, want %q", args, exit, printed, want)
		}
	}
	const files = "/etc/hostname: \"NAME\\n\" false\n" +
		"/etc/hosts: \"127.0.0.1\\tlocalhost\\n::1\\tlocalhost ip6-localhost ip6-loopback\\n127.0.1.1\\tNAME\\n\" false\n" +
		"/proc/sys/kernel/hostname: \"NAME\\n\" false\n"
	printFiles := func(client portalv1.ProcessServiceClient, name string) {
		t.Helper()
		print(client, strings.ReplaceAll(files, "NAME", name), "files", "/etc/hostname", "/etc/hosts", "/proc/sys/kernel/hostname")
	}
	printFiles(client, "template")

	// The builder rehearses the start of a sandbox, after which the container is still that of a template.
	ok(t)(g.CreateContainer(ctx, request("template-2", "template")))
	ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "template-2"}))

	// The guest is another one now. The builder's connection to the agent ends, and so does the validity of its token.
	token := g.personalize(t)
	g.hangUp()
	g.dial()
	refused := g.dialPortal(t, builder)
	if n, err := refused.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("a connection with an earlier token: read %d bytes, %v", n, err)
	}
	ok(t)(g.CreateSandbox(ctx, &pb.CreateSandboxRequest{SandboxId: "box3", Hostname: "guest", Storages: []*pb.Storage{{
		Driver: "ephemeral", Source: "shm", Fstype: "tmpfs", MountPoint: "/run/kata-containers/sandbox/shm",
	}}}))
	other := request("box3", "adopted")
	other.OCI.Process.Env = append(other.OCI.Process.Env, "NEW=1")
	_, err := g.CreateContainer(ctx, other)
	wantCode(t, err, codes.FailedPrecondition)
	if err == nil || !strings.Contains(err.Error(), "Process.Env") {
		t.Errorf("adopt a container with another environment: %v, want an error that names it", err)
	}
	ok(t)(g.CreateContainer(ctx, request("box3", "adopted")))
	_, err = g.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: "template-2"})
	wantCode(t, err, codes.NotFound)
	ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "box3"}))
	_, err = g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "box3"})
	wantCode(t, err, codes.FailedPrecondition)
	_, err = g.CreateContainer(ctx, request("box4", "adopted"))
	wantCode(t, err, codes.FailedPrecondition)

	client, hangUp = portalClient(t, g.dialPortal(t, token))
	defer hangUp()
	printFiles(client, "adopted")
	g.callControl(t, func(c *control.Client) error { return c.SetHostname(ctx, "renamed") })
	printFiles(client, "renamed")
	// A program can neither reach the agent's port nor pretend to be the host. It can use ping.
	print(client, "\"\" <nil>\n", "connect", "10.0.2.15:4600")
	print(client, "network is unreachable\n", "connect", "10.0.2.15:4600", "10.0.2.2:0")
	print(client, "connection refused\n", "connect", "127.0.0.1:4600")
	print(client, "operation not permitted\noperation not permitted\n<nil>\n", "sockets")
	print(client, "/proc/sys/net/ipv6/conf/eth1/disable_ipv6: \"1\\n\" false\n", "files", "/proc/sys/net/ipv6/conf/eth1/disable_ipv6")

	ok(t)(g.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "box3", Signal: 9}))
	if r := g.finish(t, "box3", "box3"); r.status != 128+9 {
		t.Errorf("the main process: %v", r)
	}
	ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: "box3"}))
}

// TestSetToken sets the token of a guest without a network interface, of a guest with a sandbox's container, and of one with a
// template's. Only the last one drops the connection of the agent's port.
func TestSetToken(t *testing.T) {
	a := newAgent(slog.New(slog.DiscardHandler))
	hungUp := 0
	a.hangUp = func() { hungUp++ }
	if err := a.SetToken(portalport.NewToken()); err == nil {
		t.Error("set the token of a guest without a network interface")
	}
	if _, err := a.AwaitPortal(time.Second); err == nil {
		t.Error("waited for the portal of a guest without a network interface")
	}
	a.gate = gate.New(a.log)
	for id, want := range map[string]int{"": 0, "box": 0, "template-1": 1} {
		a.containers = map[string]*containerEntry{}
		if id != "" {
			a.containers[id] = &containerEntry{}
		}
		hungUp = 0
		if err := a.SetToken(portalport.NewToken()); err != nil || hungUp != want {
			t.Errorf("with the container %q: %v, hung up %d times, want %d", id, err, hungUp, want)
		}
	}
}
