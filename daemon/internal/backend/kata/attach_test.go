package kata

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A connection to a sandbox that was just removed does not create its directory again, which would stay.
func TestAttachCreatesNoDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sb-1")
	if fifos, err := newFIFOs(dir, "portal-1"); !errors.Is(err, os.ErrNotExist) || !missing(dir) {
		t.Errorf("without a directory: %v, %v", fifos, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fifos, err := newFIFOs(dir, "portal-1")
	if err != nil {
		t.Fatal(err)
	}
	if err := fifos.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); len(left) != 0 || err != nil {
		t.Errorf("left in the directory: %v, %v", left, err)
	}
}

// The bridge has the user of the portal, but not its working directory, which the sandbox may have removed or replaced.
func TestBridge(t *testing.T) {
	main := specs.Process{Args: []string{"/.msb/portal", "serve"}, Cwd: "/app", User: specs.User{UID: 7}, Env: []string{"A=b"}}
	want := specs.Process{Cwd: "/", User: specs.User{UID: 7}, Env: []string{"A=b"}}
	for transfer, args := range map[string][]string{"": {"connect"}, "1f": {"transfer", "1f"}} {
		want.Args = append([]string{"/.msb/portal"}, args...)
		if got := bridge(main, transfer); !reflect.DeepEqual(got, want) || main.Args[1] != "serve" {
			t.Errorf("for the transfer %q: got %+v, want %+v", transfer, got, want)
		}
	}
}

// The output of an exec of a daemon that was killed is read until the exec ends. That of an exec of this daemon is not.
func TestDrainAbandoned(t *testing.T) {
	r := &Runtime{Config: Config{RunDir: t.TempDir()}}
	for exec, drained := range map[string]bool{"portal-00000000-00000000123": true, execs + "00000000123": false} {
		dir := filepath.Join(r.dir("id"), exec)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "stdout")
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		shim, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		r.drainAbandoned("id")
		if !drained {
			_ = shim.SetWriteDeadline(time.Now())
		}
		if _, err := shim.Write(make([]byte, 1<<20)); (err == nil) != drained {
			t.Errorf("%s: write of its output: %v", exec, err)
		}
		shim.Close()
		for drained {
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
}
