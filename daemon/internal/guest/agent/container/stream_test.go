package container

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// newTestOutput returns an output and the process's end of it.
func newTestOutput(t *testing.T) (*output, *os.File) {
	t.Helper()
	process, ours, err := stdioPipe(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return newOutput(ours), process
}

func readAll(t *testing.T, o *output) []byte {
	t.Helper()
	var all []byte
	for {
		p, err := o.read(t.Context(), 1<<20)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p...)
	}
}

func TestOutputEndsWithItsPipe(t *testing.T) {
	o, process := newTestOutput(t)
	if _, err := process.WriteString("abc"); err != nil {
		t.Fatal(err)
	}
	process.Close()
	if p, err := o.read(t.Context(), 2); string(p) != "ab" || err != nil {
		t.Errorf("got %q, %v", p, err)
	}
	if p := readAll(t, o); string(p) != "c" {
		t.Errorf("got %q", p)
	}
}

// A read whose caller is gone must not take what comes later.
func TestOutputKeepsWhatNobodyRead(t *testing.T) {
	o, process := newTestOutput(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err := o.read(ctx, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("got %q, %v", p, err)
	}
	if _, err := process.WriteString("late"); err != nil {
		t.Fatal(err)
	}
	process.Close()
	if p := readAll(t, o); string(p) != "late" {
		t.Errorf("got %q", p)
	}
}

// A process may end with a full pipe that another one holds open: all of it arrives, then the end.
func TestOutputExpires(t *testing.T) {
	o, process := newTestOutput(t)
	want := bytes.Repeat([]byte("x"), pipeCapacity)
	if _, err := process.Write(want); err != nil {
		t.Fatal(err)
	}
	o.expire()
	if p := readAll(t, o); !bytes.Equal(p, want) {
		t.Errorf("got %d of %d bytes", len(p), len(want))
	}
}

func TestOutputAbandoned(t *testing.T) {
	o, process := newTestOutput(t)
	if _, err := process.WriteString("unread"); err != nil {
		t.Fatal(err)
	}
	o.abandon()
	for range o.chunks { // the pump ends
	}
}

func TestInputGivesUpWithItsCaller(t *testing.T) {
	process, ours, err := stdioPipe(true)
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	in := newInput(ours, false)
	defer in.close()
	if _, err := unix.FcntlInt(ours.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(int(ours.Fd()), true); err != nil {
		t.Fatal(err)
	}
	if n, err := in.write(t.Context(), make([]byte, 4096)); n != 4096 || err != nil {
		t.Fatalf("to an empty pipe: wrote %d bytes, %v", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if n, err := in.write(ctx, make([]byte, 4096)); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("to a full one: wrote %d bytes, %v", n, err)
	}
	if _, err := io.CopyN(io.Discard, process, 4096); err != nil {
		t.Fatal(err)
	}
	if n, err := in.write(t.Context(), []byte("more")); n != 4 || err != nil {
		t.Errorf("afterwards: wrote %d bytes, %v", n, err)
	}
	process.Close()
	if _, err := in.write(t.Context(), []byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("to nobody: %v", err)
	}
}
