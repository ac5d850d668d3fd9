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
	"syscall"
	"testing"
	"time"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// fakeProcess is the name under which the test program acts as a fake process. It blocks until it is killed.
const fakeProcess = "microvm-test-stand-in"

func TestMain(m *testing.M) {
	if os.Args[0] == fakeProcess {
		io.Copy(io.Discard, os.Stdin) // never ends
		return
	}
	os.Exit(m.Run())
}

// newID returns a new sandbox id.
func newID(t *testing.T) string {
	t.Helper()
	var b [8]byte
	rand.Read(b[:])
	return "sb-" + hex.EncodeToString(b[:])
}

// startFake starts a fake process with these arguments, in a cgroup unless that is "".
func startFake(t *testing.T, cgroup string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := startFakeAs(t, 0, args...)
	if cgroup != "" {
		writeFile(t, filepath.Join(cgroup, "cgroup.procs"), strconv.Itoa(cmd.Process.Pid))
	}
	return cmd
}

// testPrograms are the executables of the fake processes.
var testPrograms = []string{"/proc/self/exe"}

// startFakeAs is like startFake without a cgroup, but the process runs as user uid.
func startFakeAs(t *testing.T, uid uint32, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{fakeProcess}, args...)
	if uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	// The arguments of a process become visible only a moment after its start.
	waitUntil(t, "its arguments are visible", func() bool { return slices.Equal(process.Arguments(cmd.Process.Pid), cmd.Args) })
	return cmd
}

// newCgroup creates a cgroup as a shim does. path includes its parents.
func newCgroup(t *testing.T, path string) string {
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
			os.Remove(cgroup) // fails if it is in use
		}
	})
	return cgroup
}

// newTestRuntime returns a Runtime without a containerd, and its log.
func newTestRuntime(t *testing.T) (*Runtime, *bytes.Buffer) {
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
		t.Fatal("no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %v, want %q in it", err, part)
		}
	}
}

func waitUntil(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for limit := time.Now().Add(30 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("timed out waiting until %s", what)
		}
	}
}
