package control

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestFollow checks the times of the checks, and that only changes are logged.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var output bytes.Buffer
		results := []error{nil, io.ErrClosedPipe, io.ErrUnexpectedEOF, nil, nil, io.EOF, nil}
		checked, started := 0, time.Now()
		follow(ctx, slog.New(slog.NewTextHandler(&output, nil)), func() error {
			if got, want := time.Since(started), time.Duration(checked)*30*time.Second; got != want {
				t.Errorf("check %d after %v, want %v", checked, got, want)
			}
			checked++
			if checked > len(results) {
				cancel()
				return ctx.Err() // not logged
			}
			return results[checked-1]
		})
		const failed, works = `level=WARN msg="could not check the guest's clock" err=`, `level=INFO msg="the guest's clock is checked again"`
		var lines []string
		for line := range strings.Lines(output.String()) {
			_, line, _ = strings.Cut(strings.TrimSpace(line), " ")
			lines = append(lines, line)
		}
		want := []string{failed + `"io: read/write on closed pipe"`, works, failed + "EOF", works}
		if strings.Join(lines, "\n") != strings.Join(want, "\n") {
			t.Errorf("logged %q, want %q", lines, want)
		}
	})
}

// TestFollowConnects lets Follow correct a guest's clock. Follow must disconnect after that.
func TestFollowConnects(t *testing.T) {
	l, path := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Follow(ctx, path, slog.New(slog.DiscardHandler))
	}()
	guest, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	clock := &clock{ahead: time.Hour}
	if err := Serve(guest, clock.handle); err != nil {
		t.Error(err)
	}
	if clock.ahead.Abs() > 5*time.Millisecond {
		t.Errorf("the clock is ahead by %v", clock.ahead)
	}
	cancel()
	<-done
}
