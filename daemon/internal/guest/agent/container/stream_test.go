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

// newTestOutput returns an output and the process's end of its pipe.
func newTestOutput(t *testing.T) (*output, *os.File) {
	t.Helper()
	process, agentEnd, err := stdioPipe(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { process.Close() })
	return newOutput(agentEnd), process
}

// readAll reads until io.EOF.
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

func TestOutputEndsWithPipe(t *testing.T) {
	o, process := newTestOutput(t)
	if _, err := process.WriteString("abc"); err != nil {
		t.Fatal(err)
	}
	process.Close()
	if p, err := o.read(t.Context(), 2); string(p) != "ab" || err != nil {
		t.Errorf("read of 2 bytes = %q, %v; want ab", p, err)
	}
	if p := readAll(t, o); string(p) != "c" {
		t.Errorf("rest is %q, want c", p)
	}
}

// TestOutputKeepsUnreadData checks that a read whose context is done does not take output that arrives later.
func TestOutputKeepsUnreadData(t *testing.T) {
	o, process := newTestOutput(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p, err := o.read(ctx, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("read with a canceled context = %q, %v; want context.Canceled", p, err)
	}
	if _, err := process.WriteString("late"); err != nil {
		t.Fatal(err)
	}
	process.Close()
	if p := readAll(t, o); string(p) != "late" {
		t.Errorf("output is %q, want late", p)
	}
}

// TestOutputExpires checks that all output arrives, and then the end, if a process exits with a full pipe that another
// process holds open.
func TestOutputExpires(t *testing.T) {
	o, process := newTestOutput(t)
	want := bytes.Repeat([]byte("x"), pipeCapacity)
	if _, err := process.Write(want); err != nil {
		t.Fatal(err)
	}
	o.endAfterExit()
	if p := readAll(t, o); !bytes.Equal(p, want) {
		t.Errorf("read %d bytes that are not the %d bytes written", len(p), len(want))
	}
}

func TestOutputAbandoned(t *testing.T) {
	o, process := newTestOutput(t)
	if _, err := process.WriteString("unread"); err != nil {
		t.Fatal(err)
	}
	o.abandon()
	for range o.chunks { // until pump returns
	}
}

func TestInputWriteEndsWithContext(t *testing.T) {
	process, agentEnd, err := stdioPipe(true)
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	in := newInput(agentEnd, false)
	defer in.close()
	if _, err := unix.FcntlInt(agentEnd.Fd(), unix.F_SETPIPE_SZ, 4096); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(int(agentEnd.Fd()), true); err != nil {
		t.Fatal(err)
	}
	if n, err := in.write(t.Context(), make([]byte, 4096)); n != 4096 || err != nil {
		t.Fatalf("write to an empty pipe: %d bytes, %v; want 4096", n, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if n, err := in.write(ctx, make([]byte, 4096)); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("write to a full pipe: %d bytes, %v; want 0 and context.DeadlineExceeded", n, err)
	}
	if _, err := io.CopyN(io.Discard, process, 4096); err != nil {
		t.Fatal(err)
	}
	if n, err := in.write(t.Context(), []byte("more")); n != 4 || err != nil {
		t.Errorf("write after the pipe was emptied: %d bytes, %v; want 4", n, err)
	}
	process.Close()
	if _, err := in.write(t.Context(), []byte("x")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("write to a closed pipe: %v, want errdefs.ErrFailedPrecondition", err)
	}
}
