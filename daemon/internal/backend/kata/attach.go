package kata

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/cio"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
)

// stream is the standard input and output of a process in a sandbox.
type stream struct {
	io      *cio.DirectIO
	process containerd.Process
	ended   <-chan containerd.ExitStatus
	once    sync.Once
}

// Attach satisfies sandbox.Runtime: it runs `portal connect` in the sandbox, which bridges its
// standard streams to the portal. A connection that an earlier daemon left is ended by the portal.
func (r *Runtime) Attach(ctx context.Context, id string) (io.ReadWriteCloser, error) {
	ctx = ctrd.InNamespace(ctx)
	container, err := r.Client.LoadContainer(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("find the container: %w", err)
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("find the task: %w", err)
	}
	var suffix [4]byte
	rand.Read(suffix[:])
	execID := "portal-" + hex.EncodeToString(suffix[:])
	// The streams live as long as the connection, not as long as this call.
	life := context.WithoutCancel(ctx)
	var direct *cio.DirectIO
	if err := os.MkdirAll(r.dir(id), 0o700); err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	process, err := task.Exec(ctx, execID, &specs.Process{
		Args: []string{portalPath, "connect"},
		Cwd:  "/",
		User: specs.User{},
	}, func(string) (cio.IO, error) {
		fifos, err := cio.NewFIFOSetInDir(r.dir(id), execID, false)
		if err != nil {
			return nil, err
		}
		fifos.Stderr = ""
		direct, err = cio.NewDirectIO(life, fifos)
		return direct, err
	})
	if err != nil {
		return nil, fmt.Errorf("prepare a connection to the portal: %w", err)
	}
	s := &stream{io: direct, process: process}
	if s.ended, err = process.Wait(life); err == nil {
		err = process.Start(ctx)
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("connect to the portal: %w", err)
	}
	return s, nil
}

func (s *stream) Read(p []byte) (int, error)  { return s.io.Stdout.Read(p) }
func (s *stream) Write(p []byte) (int, error) { return s.io.Stdin.Write(p) }

// Close ends the connection. It does not wait for a guest that no longer answers.
func (s *stream) Close() error {
	s.once.Do(func() {
		// Standard input ends first, and with it `portal connect`. Kata's shim blocks all of the
		// sandbox when it is asked to close an input that has not ended.
		s.io.Stdin.Close()
		ctx, cancel := context.WithTimeout(ctrd.InNamespace(context.Background()), 5*time.Second)
		defer cancel()
		if err := s.process.Kill(ctx, syscall.SIGKILL); err == nil && s.ended != nil {
			select {
			case <-s.ended:
			case <-ctx.Done():
			}
		}
		if _, err := s.process.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
			// The task is gone or going, and its processes with it.
			s.io.Cancel()
		}
		s.io.Close()
	})
	return nil
}
