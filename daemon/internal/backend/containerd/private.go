package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/durable"
	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

const (
	// startTimeout is how long containerd may take to start serving. It is long because containerd connects to the
	// shims one after the other.
	startTimeout = 2 * time.Minute
	// stopTimeout is how long a containerd that did not start serving may take to exit before it is killed.
	stopTimeout = 5 * time.Second
	// shimLoadTimeout is how long a starting containerd waits for each shim. After that it ends the shim's sandbox.
	shimLoadTimeout = 20 * time.Second
	// shimStateTimeout is how long containerd waits for the state of a task. After that it reports the state as
	// unknown.
	shimStateTimeout = 10 * time.Second
)

var errExited = errors.New("containerd exited while starting")

// Private is the server's private containerd. It is a process in its own session. This way, it and the sandboxes' shims
// survive the daemon. A starting daemon adopts it if it is already running. Binary, Paths and Log are required.
type Private struct {
	Binary string // path of the containerd executable
	Paths
	Log *slog.Logger

	stopping atomic.Bool
}

func (p *Private) config() string {
	return fmt.Sprintf(`# Written by msbd at each start; changes are lost.
version = 2
root = %q
state = %q
# CRI and /opt/containerd are not used, and their plugins would create directories elsewhere on the host.
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]

[grpc]
  address = %q

# Long, so that containerd does not treat a slow shim on a busy host as dead.
[timeouts]
  "io.containerd.timeout.shim.load" = %q
  "io.containerd.timeout.task.state" = %q
`, p.Root, p.State, p.Address, shimLoadTimeout, shimStateTimeout)
}

// Start adopts the running containerd or starts one, and returns when it is serving. From then on, containerd is
// restarted whenever it exits, until ctx ends or Stop is called.
func (p *Private) Start(ctx context.Context) error {
	running, err := p.Process()
	if err != nil {
		return err
	}
	adopted := running != nil
	if !adopted {
		if running, err = p.launch(); err != nil {
			return err
		}
	}
	if err := p.waitServing(ctx, running); err != nil {
		if !adopted { // otherwise containerd would keep its root directory locked
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			err = errors.Join(err, terminate(limited, running))
		}
		running.Close()
		return err
	}
	if adopted { // an earlier daemon, perhaps with a lower limit of open files, started it
		if err := shareFileLimit(running.PID); err != nil {
			p.Log.Warn("could not raise the limit of open files of the adopted containerd", "err", err)
		}
	}
	p.Log.Info("containerd is serving", "pid", running.PID, "adopted", adopted, "socket", p.Address)
	go p.supervise(ctx, running) // ends with ctx or Stop
	return nil
}

// shareFileLimit sets the limit of open files of process pid to that of this process. The process passes it on to its
// children, such as Kata's shims and their virtiofsd.
func shareFileLimit(pid int) error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil)
}

// Process returns the running private containerd, whichever daemon started it, or nil if none is running. It finds the
// process that launch recorded. If there is no record, because the daemon was killed right after the launch or was an
// older one, it searches. The caller must close the process.
func (p *Private) Process() (*process.Process, error) {
	var id process.ID
	if record, err := os.ReadFile(p.processFile()); err == nil && json.Unmarshal(record, &id) == nil {
		if running, err := id.Open(); running != nil || err != nil {
			return running, err
		}
	}
	found, err := process.FindOwn(process.UIDs{}, []string{p.Binary}, func(pid int) bool {
		args := process.Arguments(pid)
		return len(args) > 2 && args[1] == "--config" && args[2] == p.configFile()
	})
	defer func() { process.CloseAll(found) }()
	if err != nil || len(found) == 0 {
		return nil, err
	}
	// A child of containerd looks like containerd until it executes another program.
	oldest, first := 0, process.ID{}
	for i, candidate := range found {
		if id, err := candidate.ID(); err == nil && (first.PID == 0 || id.Start < first.Start) {
			oldest, first = i, id
		}
	}
	running := found[oldest]
	found = slices.Delete(found, oldest, oldest+1)
	return running, nil
}

// processFile is where launch records containerd's process.
func (p *Private) processFile() string { return filepath.Join(p.State, "process.json") }

// record writes the process file.
func (p *Private) record(launched *process.Process) error {
	id, err := launched.ID()
	if err != nil {
		return err
	}
	data, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return durable.WriteFile(p.processFile(), data, 0o600)
}

func (p *Private) configFile() string { return filepath.Join(p.State, "containerd.toml") }

func (p *Private) launch() (*process.Process, error) {
	for _, dir := range []string{p.Root, p.State} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("create containerd's directory: %w", err)
		}
	}
	if err := os.WriteFile(p.configFile(), []byte(p.config()), 0o600); err != nil {
		return nil, fmt.Errorf("write containerd's configuration: %w", err)
	}
	log, err := os.OpenFile(p.LogFile(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open containerd's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(p.Binary, "--config", p.configFile(), "--log-level", "warn") // Process looks for this
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	// Pass few variables: shims and hypervisors inherit the environment, and some shims read their configuration from
	// it.
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := process.WithoutOOMProtection(cmd.Start); err != nil { // shims inherit this
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	launched, err := process.Open(cmd.Process.Pid) // the pid cannot be reused until the process is reaped
	if err == nil {
		if err = p.record(launched); err != nil {
			launched.Close()
		}
	}
	if err != nil {
		err = fmt.Errorf("start containerd: %w", errors.Join(err, cmd.Process.Kill()))
	}
	// This goroutine only reaps the process; supervise waits for its exit. The goroutine ends with containerd or with
	// the daemon.
	go cmd.Wait()
	if err != nil {
		return nil, err
	}
	return launched, nil
}

// waitServing waits until containerd is serving. If containerd exits first, waitServing returns an error with the end
// of containerd's log.
func (p *Private) waitServing(ctx context.Context, running *process.Process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("containerd did not start serving on %s within %s; see %s", p.Address, startTimeout, p.LogFile()))
	defer cancel()
	client, err := Dial(p.Address)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, died := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if running.Wait(ctx) == nil {
			died(fmt.Errorf("%w; the end of %s: %s", errExited, p.LogFile(), tail.Read(p.LogFile(), 1000)))
		}
	}()
	err = WaitServing(ctx, client)
	died(nil)
	<-watched
	return err
}

// supervise restarts containerd whenever it exits, until ctx ends or Stop is called. It closes running. The sandboxes
// keep running while containerd restarts.
func (p *Private) supervise(ctx context.Context, running *process.Process) {
	pause := func() {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	for {
		pid := 0 // 0 if containerd could not be started
		if running != nil {
			if err := running.Wait(ctx); err != nil && ctx.Err() == nil {
				p.Log.Error("could not watch containerd; trying again", "err", err)
				pause()
				continue
			}
			pid = running.PID
			running.Close()
		}
		if ctx.Err() != nil || p.stopping.Load() {
			return
		}
		p.Log.Error("containerd exited; restarting it", "pid", pid, "log", p.LogFile())
		var err error
		if running, err = p.launch(); err == nil {
			if p.stopping.Load() { // Stop may have looked for containerd before this launch
				_ = terminate(ctx, running)
				running.Close()
				return
			}
			err = p.waitServing(ctx, running)
		}
		if err != nil && ctx.Err() == nil {
			p.Log.Error("could not restart containerd", "err", err)
			pause()
		}
	}
}

// Stop stops containerd, and kills it if ctx ends first. All sandboxes must have been stopped.
func (p *Private) Stop(ctx context.Context) error {
	p.stopping.Store(true)
	running, err := p.Process()
	if running == nil || err != nil {
		return err
	}
	defer running.Close()
	return terminate(ctx, running)
}

// terminate sends SIGTERM to containerd and waits until it exits. If ctx ends first, it kills containerd.
func terminate(ctx context.Context, running *process.Process) error {
	err := running.Signal(syscall.SIGTERM)
	if err == nil {
		err = running.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("containerd did not stop on SIGTERM, so it was sent SIGKILL: %w", errors.Join(err, running.Signal(syscall.SIGKILL)))
	}
	return nil
}
