package localsock

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/peer"
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
	open, group := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Chmod(open, 0o777), os.Chmod(group, 0o770)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "msbd.sock")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(open, "msbd.sock"), filepath.Join(group, "msbd.sock"), file} {
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

// systemd passes sockets as descriptors from 3 on and names this process in LISTEN_PID. A shell between
// stands in for systemd's fork: its pid is that of the test binary that it becomes.
func TestSocketsFromSystemd(t *testing.T) {
	if path, ok := os.LookupEnv("LOCALSOCK_TEST_CHILD"); ok {
		activatedChild(path)
		return
	}
	dir := t.TempDir()
	listen := func(network, address string) (net.Addr, *os.File) {
		t.Helper()
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return l.Addr(), f
	}
	passed, admin := listen("unix", filepath.Join(dir, "passed.sock"))
	_, another := listen("unix", filepath.Join(dir, "another.sock"))
	_, tcp := listen("tcp", "127.0.0.1:0")
	own := filepath.Join(dir, "run", "msbd.sock")

	tests := map[string]struct {
		files []*os.File
		pid   string
		// at is where it listens; empty: it refuses to.
		at string
	}{
		"one":                    {[]*os.File{admin}, "$$", passed.String()},
		"none":                   {nil, "$$", own},
		"for another process":    {[]*os.File{admin}, "1", own},
		"two":                    {[]*os.File{admin, another}, "$$", ""},
		"of the network":         {[]*os.File{tcp}, "$$", ""},
		"one and of the network": {[]*os.File{admin, tcp}, "$$", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c",
				`LISTEN_PID=`+tt.pid+` exec "$0" -test.run='^TestSocketsFromSystemd$'`, os.Args[0])
			cmd.Env = append(os.Environ(), "LISTEN_FDS="+strconv.Itoa(len(tt.files)), "LOCALSOCK_TEST_CHILD="+own)
			cmd.ExtraFiles = tt.files
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(stdout)
			lines.Scan()
			said := lines.Text()
			if tt.at == "" {
				if !strings.Contains(said, "leave only the admin socket") {
					t.Errorf("the child says %q", said)
				}
			} else if said != "listening" {
				t.Errorf("the child says %q", said)
			} else {
				conn, err := net.Dial("unix", tt.at)
				if err != nil {
					t.Fatal(err)
				}
				answer, err := io.ReadAll(conn)
				if want := fmt.Sprintf("hello %d", os.Getpid()); err != nil || string(answer) != want {
					t.Errorf("got %q, %v; want %q", answer, err, want)
				}
				conn.Close()
			}
			if t.Failed() {
				_ = cmd.Process.Kill() // it may wait for a caller
			}
			_, _ = io.Copy(io.Discard, stdout)
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			// What is systemd's is left to it; what is the daemon's own goes with it.
			if _, err := os.Stat(passed.String()); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(own); err == nil {
				t.Error("the daemon's own socket is still there")
			}
		})
	}
}

// activatedChild greets one caller by its pid, which it has from the kernel.
func activatedChild(path string) {
	l, err := Listen(path)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	if os.Getenv("LISTEN_FDS") != "" && os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		fmt.Println("the children of msbd would inherit LISTEN_FDS")
		return
	}
	fmt.Println("listening")
	conn, err := l.Accept()
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conn.Close()
	p, err := peer.Of(conn)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Fprintf(conn, "hello %d", p.PID)
}

// asNobody runs f as user and group 65534, in a thread that ends with it. Only root can.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread is not used again
		const nobody = 65534
		for _, set := range [][4]uintptr{
			{unix.SYS_SETGROUPS, 0, 0, 0}, {unix.SYS_SETRESGID, nobody, nobody, nobody}, {unix.SYS_SETRESUID, nobody, nobody, nobody},
		} {
			// Of this thread alone, unlike what package syscall offers.
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

// A user's own msbd gives its socket to no group of which the user is not.
func TestListenWithoutRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		if gid := groupID("root"); gid != -1 {
			t.Errorf("the group of root has id %d", gid)
		}
		return
	}
	if gid := groupID("root"); gid != 0 {
		t.Errorf("for root, the group of root has id %d", gid)
	}
	dir, err := os.MkdirTemp("", "localsock") // unlike t.TempDir, below a directory that everyone may enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "msb", "msbd.sock")
	asNobody(t, func() {
		if gid := groupID("root"); gid != -1 {
			t.Errorf("the group of root has id %d", gid)
		}
		if g, err := user.LookupGroupId("65534"); err != nil || groupID(g.Name) != 65534 {
			t.Errorf("its own group is not found: %v", err)
		}
		l, err := Listen(path)
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		info, err := os.Stat(path)
		if err != nil {
			t.Error(err)
		} else if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 65534 || info.Mode().Perm() != 0o660 {
			t.Errorf("the socket is %d's, %s", owner.Uid, info.Mode())
		}
	})
}
