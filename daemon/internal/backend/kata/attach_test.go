package kata

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

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
	want := specs.Process{Args: []string{"/.msb/portal", "connect"}, Cwd: "/", User: specs.User{UID: 7}, Env: []string{"A=b"}}
	if got := bridge(main); !reflect.DeepEqual(got, want) || main.Args[1] != "serve" {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
