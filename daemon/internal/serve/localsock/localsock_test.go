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

func TestListenRefusesSocketInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "msbd.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := Listen(path); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "another msbd is running") {
		t.Errorf("second Listen: got error %v, want \"another msbd is running\"", err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the first socket no longer works: %v", err)
	}
	conn.Close()
}

func TestListenReplacesStaleSocket(t *testing.T) {
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

func TestListenRefusesUnsafePaths(t *testing.T) {
	worldWritable, groupWritable := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Chmod(worldWritable, 0o777), os.Chmod(groupWritable, 0o770)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "msbd.sock")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(worldWritable, "msbd.sock"), filepath.Join(groupWritable, "msbd.sock"), file} {
		if _, err := Listen(path); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Listen(%s): got error %v, want failed precondition", path, err)
		}
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
		t.Errorf("Listen changed the file: it is %q, error %v", data, err)
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 200), "msbd.sock")
	if _, err := Listen(long); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Listen with a long path: got error %v, want invalid argument", err)
	}
}

// systemd passes sockets as descriptors from 3 on and sets LISTEN_PID to the pid of the service. The test uses a
// shell in place of systemd's forked child: the shell sets LISTEN_PID to its own pid, which the test binary keeps
// because the shell execs it.
func TestSocketActivation(t *testing.T) {
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
		// path is where the child should listen; empty means that Listen should fail.
		path string
	}{
		"one Unix socket":                  {[]*os.File{admin}, "$$", passed.String()},
		"no socket":                        {nil, "$$", own},
		"for another process":              {[]*os.File{admin}, "1", own},
		"two Unix sockets":                 {[]*os.File{admin, another}, "$$", ""},
		"a TCP socket":                     {[]*os.File{tcp}, "$$", ""},
		"one Unix socket and a TCP socket": {[]*os.File{admin, tcp}, "$$", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c",
				`LISTEN_PID=`+tt.pid+` exec "$0" -test.run='^TestSocketActivation$'`, os.Args[0])
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
			line := lines.Text()
			if tt.path == "" {
				if !strings.Contains(line, "leave only the admin socket") {
					t.Errorf("the child printed %q, want the error of Listen", line)
				}
			} else if line != "listening" {
				t.Errorf("the child printed %q, want listening", line)
			} else {
				conn, err := net.Dial("unix", tt.path)
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
				_ = cmd.Process.Kill() // the child may still be waiting in Accept
			}
			_, _ = io.Copy(io.Discard, stdout)
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			// The daemon must remove the socket that it bound itself, but not the one that belongs to systemd.
			if _, err := os.Stat(passed.String()); err != nil {
				t.Error("the socket of systemd:", err)
			}
			if _, err := os.Stat(own); err == nil {
				t.Error("the daemon left its own socket behind")
			}
		})
	}
}

// activatedChild listens on the admin socket, accepts one connection, and sends it the pid of its peer as the kernel
// reports it. It prints "listening" or an error.
func activatedChild(path string) {
	l, err := Listen(path)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer l.Close()
	if os.Getenv("LISTEN_FDS") != "" && os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) {
		fmt.Println("LISTEN_FDS is still set, so that child processes of msbd would inherit it")
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

// asNobody runs f as user and group 65534, on a thread that ends afterwards. It needs root.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so that the thread is not used for other goroutines
		const nobody = 65534
		for _, set := range [][4]uintptr{
			{unix.SYS_SETGROUPS, 0, 0, 0}, {unix.SYS_SETRESGID, nobody, nobody, nobody}, {unix.SYS_SETRESUID, nobody, nobody, nobody},
		} {
			// A raw system call changes only this thread; package syscall would change all threads.
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

// Without root, Listen gives the socket only to a group in which the user is a member.
func TestListenWithoutRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		if gid := groupID("root"); gid != -1 {
			t.Errorf("groupID(root) is %d for a user who is not in the group, want -1", gid)
		}
		return
	}
	if gid := groupID("root"); gid != 0 {
		t.Errorf("groupID(root) is %d for root, want 0", gid)
	}
	dir, err := os.MkdirTemp("", "localsock") // other users may not enter the parent directory of t.TempDir
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
			t.Errorf("groupID(root) is %d for a user who is not in the group, want -1", gid)
		}
		if g, err := user.LookupGroupId("65534"); err != nil || groupID(g.Name) != 65534 {
			t.Errorf("groupID does not find the user's own group: %v", err)
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
			t.Errorf("the socket belongs to user %d and has mode %s, want 65534 and 0660", owner.Uid, info.Mode())
		}
	})
}
