package localsock

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

func TestListenModes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "msb")
	l, err := Listen(filepath.Join(dir, "msbd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for path, want := range map[string]os.FileMode{dir: 0o750, filepath.Join(dir, "msbd.sock"): 0o660} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
}

func TestListenRefusesALiveSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "msbd.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen(path); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "another msbd is running") {
		t.Errorf("second Listen: %v", err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the live socket was harmed: %v", err)
	}
	conn.Close()
}

func TestListenReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "msbd.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after kill -9
	l.Close()
	if l, err = Listen(path); err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenRefusesWhatIsNotItsOwn(t *testing.T) {
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "msbd.sock")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(open, "msbd.sock"), file} {
		if _, err := Listen(path); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Listen(%s): %v, want failed precondition", path, err)
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("the file became %q, %v", data, err)
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 200), "msbd.sock")
	if _, err := Listen(long); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Listen with a long path: %v, want invalid argument", err)
	}
}

// The kernel's word, not the peer's, arrives in the handler.
func TestPeerCredentials(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "msbd.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	peers := make(chan Peer, 1)
	server := grpc.NewServer(grpc.Creds(Credentials()),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			p, ok := PeerFromContext(stream.Context())
			if !ok {
				return status.Error(codes.Internal, "no peer")
			}
			peers <- p
			return status.Error(codes.NotFound, "met")
		}))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = adminv1.NewAdminServiceClient(conn).GetStatus(context.Background(), &adminv1.GetStatusRequest{})
	if status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	p := <-peers
	if int(p.UID) != os.Getuid() || int(p.GID) != os.Getgid() || int(p.PID) != os.Getpid() {
		t.Errorf("peer is %+v, want this process", p)
	}
}

// systemd passes the socket as descriptor 3 and names this process in LISTEN_PID. A shell between
// stands in for systemd's fork: its pid is that of the test binary that it becomes.
func TestSocketFromSystemd(t *testing.T) {
	if os.Getenv("LISTEN_FDS") != "" {
		l, err := Listen("/nonexistent/msbd.sock")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("activated")); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return
	}
	path := filepath.Join(t.TempDir(), "msbd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" -test.run='^TestSocketFromSystemd$'`, os.Args[0])
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{file}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answer := make([]byte, 32)
	n, _ := conn.Read(answer)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if string(answer[:n]) != "activated" {
		t.Errorf("got %q", answer[:n])
	}
}
