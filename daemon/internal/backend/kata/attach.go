package kata

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
)

// A stream is the standard input and output of a process in a sandbox.
type stream struct {
	io      *cio.DirectIO
	process containerd.Process
	exited  <-chan containerd.ExitStatus
	once    sync.Once
}

// Attach implements sandbox.Runtime. On the hypervisor service it connects to the guest over the sandbox's network. In other
// sandboxes, which are those of Kata's own driver and of earlier versions, it runs `portal connect` or `portal transfer ID` in the sandbox, which connects its standard
// streams to the portal. With connect, the portal then closes the connection of an earlier daemon, if there is one.
func (r *Runtime) Attach(ctx context.Context, id, transfer string) (io.ReadWriteCloser, error) {
	conn, err := r.VMs.DialPortal(ctx, id, transfer)
	if err == nil {
		return conn, nil
	}
	if !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
		return nil, err
	}
	if transfer == "" {
		r.drainAbandoned(id)
	}
	ctx = ctrd.InNamespace(ctx)
	container, err := r.Client.LoadContainer(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("find the container: %w", err)
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("find the task: %w", err)
	}
	spec, err := container.Spec(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the container's spec: %w", err)
	}
	connect := bridge(*spec.Process, transfer)
	execID := execs + randomHex()
	// The streams are used for the lifetime of the connection, so they must not end with ctx.
	connCtx := context.WithoutCancel(ctx)
	var direct *cio.DirectIO
	process, err := task.Exec(ctx, execID, &connect, func(string) (cio.IO, error) {
		fifos, err := newFIFOs(r.dir(id), execID)
		if err != nil {
			return nil, err
		}
		direct, err = cio.NewDirectIO(connCtx, fifos)
		return direct, err
	})
	if err != nil {
		return nil, fmt.Errorf("prepare a connection to the portal: %w", err)
	}
	s := &stream{io: direct, process: process}
	if s.exited, err = process.Wait(connCtx); err == nil {
		err = process.Start(ctx)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	return s, nil
}

// bridge returns the process that connects msbd to the portal, main. It is like main, and runs the same program, which may
// be that of an earlier version of msbd. It runs in the root directory, because the sandbox may have removed the working
// directory of its image. Kata's shim does not pass on capabilities and limits, so the process has fewer.
func bridge(main specs.Process, transfer string) specs.Process {
	if main.Args = []string{main.Args[0], "connect"}; transfer != "" {
		main.Args = []string{main.Args[0], "transfer", transfer}
	}
	main.Cwd = "/"
	return main
}

// execs begins the ids of the execs of this process.
var execs = "portal-" + randomHex() + "-"

func randomHex() string {
	b := make([]byte, 4)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// drainAbandoned reads what the execs of an earlier daemon, which was killed, still print. Kata's shim ends an exec only after
// somebody has read all of its output.
func (r *Runtime) drainAbandoned(id string) {
	entries, _ := os.ReadDir(r.dir(id)) // if it is missing, Attach reports that
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "portal-") || strings.HasPrefix(e.Name(), execs) {
			continue
		}
		dir := filepath.Join(r.dir(id), e.Name())
		out, err := os.OpenFile(filepath.Join(dir, "stdout"), os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		go func() {
			defer out.Close()
			if _, err := io.Copy(io.Discard, out); err == nil {
				_ = os.RemoveAll(dir)
			}
		}()
	}
}

// newFIFOs chooses paths for the FIFOs of the exec execID, in the sandbox's directory dir. Start created dir. If dir is
// missing, the sandbox was just removed, and newFIFOs returns an error. cio.NewFIFOSetInDir would create dir again.
func newFIFOs(dir, execID string) (*cio.FIFOSet, error) {
	temp, err := os.MkdirTemp(dir, execID)
	if err != nil {
		return nil, err
	}
	config := cio.Config{Stdin: filepath.Join(temp, "stdin"), Stdout: filepath.Join(temp, "stdout")}
	return cio.NewFIFOSet(config, func() error { return os.RemoveAll(temp) }), nil
}

func (s *stream) Read(p []byte) (int, error)  { return s.io.Stdout.Read(p) }
func (s *stream) Write(p []byte) (int, error) { return s.io.Stdin.Write(p) }

// Close closes the connection. It returns within a bounded time even if the guest does not respond.
func (s *stream) Close() error {
	s.once.Do(func() {
		// Close standard input first, which ends `portal connect`. Kata's shim blocks all calls for the sandbox if it
		// is asked to close a standard input that has not ended.
		s.io.Stdin.Close()
		// The shim reports the exit only after it has passed on all output.
		go func() { _, _ = io.Copy(io.Discard, s.io.Stdout) }()
		ctx, cancel := context.WithTimeout(ctrd.InNamespace(context.Background()), 5*time.Second)
		defer cancel()
		if err := s.process.Kill(ctx, syscall.SIGKILL); err == nil && s.exited != nil {
			select {
			case <-s.exited:
			case <-ctx.Done():
			}
		}
		if _, err := s.process.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
			// The process cannot be deleted, because the task has ended or is ending. Stop waiting for its streams.
			s.io.Cancel()
		}
		s.io.Close()
	})
	return nil
}
