package kata

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// standIn is the name under which this program plays some process: it blocks until it is killed.
const standIn = "microvm-test-stand-in"

func TestMain(m *testing.M) {
	if os.Args[0] == standIn {
		io.Copy(io.Discard, os.Stdin) // which never ends
		return
	}
	os.Exit(m.Run())
}

// newID is like the id of a sandbox.
func newID(t *testing.T) string {
	t.Helper()
	var b [8]byte
	rand.Read(b[:])
	return "sb-" + hex.EncodeToString(b[:])
}

// play starts a process with the arguments; in a cgroup, if that is given.
func play(t *testing.T, cgroup string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{standIn}, args...)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	// The kernel shows a process's arguments a moment after its start.
	eventually(t, "its arguments are to be seen", func() bool { return slices.Equal(process.Arguments(cmd.Process.Pid), cmd.Args) })
	if cgroup != "" {
		writeFile(t, filepath.Join(cgroup, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid))
	}
	return cmd
}

// makeCgroup makes a cgroup as a shim does, at a path that begins with its parent.
func makeCgroup(t *testing.T, path string) string {
	t.Helper()
	root := "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		root = filepath.Join(root, "pids") // cgroup v1
	}
	cgroup := filepath.Join(root, path)
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for ; cgroup != root; cgroup = filepath.Dir(cgroup) {
			os.Remove(cgroup) // what is in use stays
		}
	})
	return cgroup
}

func testRuntime(t *testing.T) (*Runtime, *bytes.Buffer) {
	t.Helper()
	dir, log := t.TempDir(), &bytes.Buffer{}
	return &Runtime{
		Config: Config{
			RunDir: dir, Containerd: ctrd.Paths{Root: dir, State: dir}, Settings: Settings{Config: "/the/host's"},
			Log: slog.New(slog.NewTextHandler(log, nil)),
		},
		removing: map[string]bool{},
	}, log
}

func missing(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("there was no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not say %q: %v", part, err)
		}
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}
