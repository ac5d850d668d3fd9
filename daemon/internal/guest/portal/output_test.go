package portal

import (
	"os"
	"testing"
	"time"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// The output of a program that always prints is batched, even if some of the emissions take longer than idlePause. Large pieces
// are read without a delay.
func TestBatches(t *testing.T) {
	discard, err := newDiscarder()
	if err != nil {
		t.Fatal(err)
	}
	defer discard.close()
	for _, tt := range []struct {
		size    int // of a piece
		batched bool
	}{
		{1 << 10, true}, {fullRead, false},
	} {
		piece := make([]byte, tt.size)
		var out *output
		var stdoutEnd, stderrEnd *os.File
		started, done := make(chan struct{}), make(chan struct{})
		emissions, delayed := 0, 0
		var last time.Time // the end of the last emission
		const after = 3 * unbatchedReads
		out, stdoutEnd, stderrEnd, err = newPipes(func(portalv1.Output_Stream, []byte) error {
			<-started
			if emissions++; emissions > unbatchedReads+1 && time.Since(last) >= batchDelay {
				delayed++
			}
			if emissions == unbatchedReads+1+after {
				close(done)
				return nil
			}
			_, _ = stdoutEnd.Write(piece) // so there is always something to read
			if emissions%(unbatchedReads/2) == 0 {
				time.Sleep(idlePause + time.Millisecond)
			}
			last = time.Now()
			return nil
		}, discard)
		if err != nil {
			t.Fatal(err)
		}
		close(started)
		_, _ = stdoutEnd.Write(piece)
		<-done
		stdoutEnd.Close()
		stderrEnd.Close()
		out.finish()
		if batched := delayed == after; batched != tt.batched {
			t.Errorf("%d of %d pieces of %d bytes were read with a delay, want all: %t", delayed, after, tt.size, tt.batched)
		}
	}
}

// The first output after attach waits for the drain at the end of a run, or else for batchDelay. Later output does not wait.
func TestFirstOutputWaits(t *testing.T) {
	discard, err := newDiscarder()
	if err != nil {
		t.Fatal(err)
	}
	defer discard.close()
	out, stdoutEnd, stderrEnd, err := newPipes(nil, discard)
	if err != nil {
		t.Fatal(err)
	}
	defer out.finish()
	defer stdoutEnd.Close()
	defer stderrEnd.Close()
	emitted := make(chan string, 10)
	emit := func(_ portalv1.Output_Stream, data []byte) error {
		emitted <- string(data)
		return nil
	}
	out.attach(emit)
	began := time.Now()
	_, _ = stdoutEnd.WriteString("first")
	if got := <-emitted; got != "first" || time.Since(began) < batchDelay {
		t.Errorf("the first output is %q after %v, want it after %v", got, time.Since(began), batchDelay)
	}
	_, _ = stdoutEnd.WriteString("second")
	if got := <-emitted; got != "second" {
		t.Errorf("the next output is %q", got)
	}
	// The end of a run does not wait.
	out.attach(emit)
	_, _ = stdoutEnd.WriteString("last")
	out.drain()
	select {
	case got := <-emitted:
		if got != "last" {
			t.Errorf("the output of a drain is %q", got)
		}
	default:
		t.Error("a drain did not emit the output")
	}
}
