package hypervisor

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

// QEMU writes its output and the guest's console to two named pipes in the VM's directory. The Service copies them to
// logs of bounded size, because a guest can write any amount. While msbd does not run, QEMU discards what it writes.

const (
	// pipeSuffix is appended to the name of a log for the name of its pipe.
	pipeSuffix = ".pipe"
	// MaxLogSize bounds each log, in bytes. A log that would get longer begins again.
	MaxLogSize = 1 << 20
	// logInterval is the shortest time between two reads, so that a guest cannot keep msbd busy.
	logInterval = 50 * time.Millisecond
	// logDrain is how long to wait for the last output of a QEMU that has exited.
	logDrain = time.Second
)

// createLog creates the pipe of the log name of the VM m and copies it. It returns the pipe's end for the writer, which
// the caller must close once QEMU has it open. The copy ends when no writer has the pipe open.
func (s *Service) createLog(m *machine, name string) (*os.File, error) {
	pipe := filepath.Join(m.dir, name+pipeSuffix)
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		return nil, fmt.Errorf("create the pipe of %s: %w", name, err)
	}
	in, err := os.OpenFile(pipe, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read the pipe of %s: %w", name, err)
	}
	out, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("write to the pipe of %s: %w", name, err)
	}
	s.copyLog(m, name, in)
	return out, nil
}

// adoptLogs continues to copy the logs of an adopted VM. The QEMU of an earlier version has no pipes, and writes to the
// logs itself.
func (s *Service) adoptLogs(m *machine) {
	for _, name := range []string{qemuLog, consoleLog} {
		if in, err := os.OpenFile(filepath.Join(m.dir, name+pipeSuffix), os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			s.copyLog(m, name, in)
		}
	}
}

// copyLog copies in to the log name of the VM m until the end of in, or of the Service. It closes in.
func (s *Service) copyLog(m *machine, name string, in *os.File) {
	m.logs.Add(1)
	s.run(func(ctx context.Context) {
		defer m.logs.Done()
		defer in.Close()
		defer context.AfterFunc(ctx, func() { in.Close() })()
		if err := CopyLog(ctx, filepath.Join(m.dir, name), in); err != nil {
			s.cfg.Log.Warn("could not write a log of a microVM", "sandbox", m.ID, "log", name, "err", err)
		}
	})
}

// CopyLog appends what it reads from in to the file log, whose size it bounds, until the end of in or until in is
// closed. After the end of ctx it does not wait between two reads. It returns an error if it cannot open the file.
func CopyLog(ctx context.Context, log string, in io.Reader) error {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	size, _ := out.Seek(0, io.SeekEnd)
	buffer := make([]byte, 64<<10)
	for {
		n, err := in.Read(buffer)
		if size += int64(n); size > MaxLogSize {
			_ = out.Truncate(0)
			size = int64(n)
		}
		_, _ = out.Write(buffer[:n])
		if err != nil {
			return nil
		}
		select {
		case <-time.After(logInterval):
		case <-ctx.Done():
		}
	}
}

// lastWords quotes the ends of the logs of the VM m for an error message. It is "" if all of them are empty. If QEMU
// has exited, lastWords first waits for its last output.
func (m *machine) lastWords() string {
	copied := make(chan struct{})
	go func() {
		m.logs.Wait()
		close(copied)
	}()
	select {
	case <-copied:
	case <-time.After(logDrain):
	}
	var b strings.Builder
	for _, name := range []string{qemuLog, consoleLog} {
		b.WriteString(tail.Quote(name, tail.Read(filepath.Join(m.dir, name), 1<<10)))
	}
	return b.String()
}
