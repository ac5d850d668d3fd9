package peer

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// A handler gets the peer's credentials as the kernel reports them.
func TestCredentials(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	peers := make(chan Peer, 1)
	server := grpc.NewServer(grpc.Creds(Credentials()),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			p, ok := FromContext(stream.Context())
			if !ok {
				return status.Error(codes.Internal, "no peer")
			}
			peers <- p
			return status.Error(codes.NotFound, "handled")
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
	err = conn.Invoke(t.Context(), "/any.Service/Method", new(emptypb.Empty), new(emptypb.Empty))
	if status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	p := <-peers
	if int(p.UID) != os.Getuid() || !slices.Contains(p.Groups, uint32(os.Getgid())) || int(p.PID) != os.Getpid() {
		t.Errorf("the peer is %+v, want this process", p)
	}
}

// Of returns the user and all groups of a peer that runs as another user.
func TestAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("nothing to test: only root can act as another user")
		return
	}
	l, err := net.Listen("unix", "@peer-test-"+strconv.Itoa(os.Getpid())) // abstract, because the user nobody cannot enter a temporary directory
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var groups []uint32
	for gid := range uint32(40) {
		groups = append(groups, 7000+gid)
	}
	asNobody(t, groups, func() {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close() // the kernel has already recorded the peer
	})
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p, err := Of(conn)
	if err != nil || p.UID != 65534 || !slices.Equal(p.Groups, append(groups, 65534)) {
		t.Errorf("Of = %+v, %v, want user and group 65534 and groups %v", p, err, groups)
	}
}

func TestNotAUnixSocket(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := Credentials().ServerHandshake(a); err == nil {
		t.Error("a connection without credentials is accepted")
	}
	if _, err := b.Write([]byte("x")); err == nil {
		t.Error("the connection is still open")
	}
}

// asNobody runs f as user and group 65534 with the given supplementary groups, in a thread that is not used afterwards.
// It requires root.
func asNobody(t *testing.T, groups []uint32, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // without an unlock, the thread ends with the goroutine
		const nobody = 65534
		for _, set := range [][4]uintptr{
			{unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0}, {unix.SYS_SETRESGID, nobody, nobody, nobody}, {unix.SYS_SETRESUID, nobody, nobody, nobody},
		} {
			// Raw system calls change this thread only. Those of package syscall change all threads.
			if _, _, errno := unix.RawSyscall(set[0], set[1], set[2], set[3]); errno != 0 {
				done <- errno
				return
			}
		}
		f()
		done <- nil
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
