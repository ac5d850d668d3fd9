package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

const (
	// startLimit bounds how long containerd may take to answer. It asks one shim after the other.
	startLimit = 2 * time.Minute
	// endLimit bounds how long one that does not answer may take to end.
	endLimit = 5 * time.Second
	// shimLoad bounds how long a containerd that starts waits for a shim, whose sandbox it ends then.
	shimLoad = 20 * time.Second
	// shimState bounds how long it waits to hear of a sandbox's state, which is unknown then.
	shimState = 10 * time.Second
)

var errEnded = errors.New("containerd ended at its start")

// Private is the server's private containerd: a process in a session of its own, so that it and the sandboxes' shims
// survive the daemon. A daemon that starts adopts the one that it finds. Binary, Paths and Log are required.
type Private struct {
	Binary string // path of the program
	Paths
	Log *slog.Logger

	stopping atomic.Bool
}

func (p *Private) config() string {
	return fmt.Sprintf(`# Written by msbd at each start; changes are lost.
version = 2
root = %q
state = %q
# Neither CRI nor /opt/containerd is used, and their plugins make directories on the whole host.
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]

[grpc]
  address = %q

# A shim on a busy host is no dead one.
[timeouts]
  "io.containerd.timeout.shim.load" = %q
  "io.containerd.timeout.task.state" = %q
`, p.Root, p.State, p.Address, shimLoad, shimState)
}

// Start adopts the running containerd or starts one, and returns when it answers. From then on it is started again
// whenever it dies, until ctx ends or Stop is called.
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
	if err := p.await(ctx, running); err != nil {
		if !adopted { // it would hold its root
			limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
			defer cancel()
			err = errors.Join(err, end(limited, running))
		}
		running.Close()
		return err
	}
	p.Log.Info("containerd answers", "pid", running.PID, "adopted", adopted, "socket", p.Address)
	go p.supervise(ctx, running) // ends with ctx or Stop
	return nil
}

// Process takes hold of the private containerd, whichever daemon started it. It is found by its arguments, and nil if none
// runs.
func (p *Private) Process() (*process.Process, error) {
	pids, err := process.PIDs()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		if !p.isOurs(pid) {
			continue
		}
		found, err := process.Open(pid)
		if err != nil {
			return nil, err
		}
		if found == nil {
			continue
		}
		if p.isOurs(pid) { // and not another process that has got the pid meanwhile
			return found, nil
		}
		found.Close()
	}
	return nil, nil
}

// isOurs reports whether a process is a containerd with this configuration, run by this server's user: anybody can start
// a process with these arguments.
func (p *Private) isOurs(pid int) bool {
	if info, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil || info.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
		return false
	}
	args := process.Arguments(pid)
	return len(args) > 2 && args[1] == "--config" && args[2] == p.configFile()
}

func (p *Private) configFile() string { return filepath.Join(p.State, "containerd.toml") }

func (p *Private) launch() (*process.Process, error) {
	for _, dir := range []string{p.Root, p.State} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make containerd's directory: %w", err)
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
	cmd := exec.Command(p.Binary, "--config", p.configFile(), "--log-level", "warn") // isOurs looks for this
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	// The shims and hypervisors inherit the environment, and some shims look for their configuration there.
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	launched, err := process.Open(cmd.Process.Pid) // which is no other's until it is reaped
	if err != nil {
		err = errors.Join(err, cmd.Process.Kill())
	}
	// Only reaps: Private watches it as it watches an adopted one. When containerd outlives the daemon, so does this wait.
	go cmd.Wait()
	return launched, err
}

// await returns when containerd answers, or with the end of its log when it died.
func (p *Private) await(ctx context.Context, running *process.Process) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startLimit, fmt.Errorf("containerd did not answer on %s within %s", p.Address, startLimit))
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
			died(fmt.Errorf("%w; the end of %s: %s", errEnded, p.LogFile(), tail.Read(p.LogFile(), 1000)))
		}
	}()
	err = WaitServing(ctx, client)
	died(nil)
	<-watched
	return err
}

// supervise starts containerd again whenever it ends. The sandboxes run on meanwhile.
func (p *Private) supervise(ctx context.Context, running *process.Process) {
	pause := func() {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	for {
		pid := 0 // none: the last one could not be started
		if running != nil {
			if err := running.Wait(ctx); err != nil && ctx.Err() == nil {
				p.Log.Error("watch containerd", "err", err)
				pause()
				continue
			}
			pid = running.PID
			running.Close()
		}
		if ctx.Err() != nil || p.stopping.Load() {
			return
		}
		p.Log.Error("containerd ended; starting it again", "pid", pid, "log", p.LogFile())
		var err error
		if running, err = p.launch(); err == nil {
			if p.stopping.Load() { // and Stop may not have seen this one
				_ = end(ctx, running)
				running.Close()
				return
			}
			err = p.await(ctx, running)
		}
		if err != nil && ctx.Err() == nil {
			p.Log.Error("start containerd again", "err", err)
			pause()
		}
	}
}

// Stop ends containerd. No sandbox may be left.
func (p *Private) Stop(ctx context.Context) error {
	p.stopping.Store(true)
	running, err := p.Process()
	if running == nil || err != nil {
		return err
	}
	defer running.Close()
	return end(ctx, running)
}

// end asks a containerd to end, and kills it if ctx ends before that.
func end(ctx context.Context, running *process.Process) error {
	err := running.Signal(syscall.SIGTERM)
	if err == nil {
		err = running.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("containerd did not end by itself: %w", errors.Join(err, running.Signal(syscall.SIGKILL)))
	}
	return nil
}
