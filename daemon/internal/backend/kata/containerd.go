package kata

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

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/defaults"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

const (
	// containerdStart bounds how long containerd may take to answer. It asks one shim after the other.
	containerdStart = 2 * time.Minute
	// shimLoad bounds how long a containerd that starts waits for a shim, whose sandbox it ends then.
	shimLoad = 20 * time.Second
	// shimState bounds how long it waits to hear of a sandbox's state, which is unknown then.
	shimState = 10 * time.Second
)

// Dial returns a client of the containerd at a Unix socket. It connects at the first call, and again
// whenever containerd was away.
func Dial(address string) (*containerd.Client, error) {
	retry := backoff.DefaultConfig
	retry.BaseDelay, retry.MaxDelay = 50*time.Millisecond, time.Second
	conn, err := grpc.NewClient("unix://"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: 10 * time.Second}), // of a busy host
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	return containerd.NewWithConn(conn)
}

// Containerd is the server's private containerd: a process of its own session, so that it and the
// sandboxes' shims survive the daemon. A daemon that starts adopts the one that it finds.
type Containerd struct {
	Binary  string // path of the program
	Root    string // persistent: images, snapshots
	State   string // gone after a reboot: tasks, bundles
	Address string // Unix socket
	Log     *slog.Logger

	pid      atomic.Int64
	stopping atomic.Bool
}

// SystemContainerd describes a containerd that is not the server's own: where it is by default, but for its socket.
func SystemContainerd(address string) *Containerd {
	return &Containerd{Address: address, Root: defaults.DefaultRootDir, State: defaults.DefaultStateDir}
}

func (c *Containerd) config() string {
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
`, c.Root, c.State, c.Address, shimLoad, shimState)
}

// LogFile is where containerd, and with it the shims, write their logs. It begins anew with each start.
func (c *Containerd) LogFile() string { return filepath.Join(c.Root, "containerd.log") }

// Start adopts the running containerd or starts one, and returns when it answers. From then on it
// is started again whenever it dies, until ctx ends or Stop is called.
func (c *Containerd) Start(ctx context.Context) error {
	pid, err := c.running()
	if err != nil {
		return err
	}
	adopted := pid != 0
	if !adopted {
		if pid, err = c.launch(); err != nil {
			return err
		}
	}
	if err := c.await(ctx, pid); err != nil {
		if !adopted { // it would hold its root
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
			defer cancel()
			err = errors.Join(err, end(ending, pid))
		}
		return err
	}
	c.Log.Info("containerd answers", "pid", pid, "adopted", adopted, "socket", c.Address)
	go c.supervise(ctx, pid) // ends with ctx or Stop
	return nil
}

// running finds the containerd of an earlier daemon by its arguments; 0 when there is none.
func (c *Containerd) running() (int, error) {
	pids, err := process.PIDs()
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		if args := arguments(pid); len(args) > 2 && args[1] == "--config" && args[2] == c.configFile() {
			return pid, nil
		}
	}
	return 0, nil
}

func (c *Containerd) configFile() string { return filepath.Join(c.State, "containerd.toml") }

func (c *Containerd) launch() (int, error) {
	for _, dir := range []string{c.Root, c.State} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return 0, fmt.Errorf("make containerd's directory: %w", err)
		}
	}
	if err := os.WriteFile(c.configFile(), []byte(c.config()), 0o600); err != nil {
		return 0, fmt.Errorf("write containerd's configuration: %w", err)
	}
	log, err := os.OpenFile(c.LogFile(), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, fmt.Errorf("open containerd's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(c.Binary, "--config", c.configFile(), "--log-level", "warn") // running looks for this
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	// It comes down to the shims, some of which would find their configuration there, and to the hypervisors.
	for _, name := range []string{"PATH", "HOME", "TMPDIR"} {
		if value, ok := os.LookupEnv(name); ok {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start containerd: %w", err)
	}
	// Only reaps: its life is watched through a pidfd, as an adopted one's is. When containerd
	// outlives the daemon, so does this wait.
	go cmd.Wait()
	return cmd.Process.Pid, nil
}

// await returns when containerd answers, or with the end of its log when it died.
func (c *Containerd) await(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, containerdStart, fmt.Errorf("containerd did not answer on %s within %s", c.Address, containerdStart))
	defer cancel()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return c.died()
	}
	defer unix.Close(fd)
	client, err := Dial(c.Address)
	if err != nil {
		return err
	}
	defer client.Close()
	var last error
	err = poll(ctx, 20*time.Millisecond, func() bool {
		if exited(fd, 0) {
			last = c.died()
			return true
		}
		return serves(ctx, client)
	})
	return errors.Join(err, last)
}

func serves(ctx context.Context, client *containerd.Client) bool {
	serving, err := client.IsServing(ctx)
	return err == nil && serving
}

func (c *Containerd) died() error {
	return fmt.Errorf("containerd ended at its start; the end of %s: %s", c.LogFile(), tail.Read(c.LogFile(), 1000))
}

// supervise starts containerd again whenever it ends. The sandboxes run on meanwhile.
func (c *Containerd) supervise(ctx context.Context, pid int) {
	for {
		c.pid.Store(int64(pid))
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			for ctx.Err() == nil && !exited(fd, 200*time.Millisecond) {
			}
			unix.Close(fd)
		}
		if ctx.Err() != nil || c.stopping.Load() {
			return
		}
		c.Log.Error("containerd ended; starting it again", "pid", pid, "log", c.LogFile())
		if pid, err = c.launch(); err == nil {
			c.pid.Store(int64(pid))
			if c.stopping.Load() { // and Stop may not have seen this one
				_ = c.Stop(ctx)
				return
			}
			err = c.await(ctx, pid)
		}
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			c.Log.Error("start containerd again", "err", err)
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
		}
	}
}

// Stop ends containerd. No sandbox may be left.
func (c *Containerd) Stop(ctx context.Context) error {
	c.stopping.Store(true)
	return end(ctx, int(c.pid.Load()))
}

// end asks a containerd to end, and has it killed when ctx ends before that.
func end(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
	if err := poll(ctx, 10*time.Millisecond, func() bool { return exited(fd, 0) }); err != nil {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		return fmt.Errorf("containerd did not end by itself: %w", err)
	}
	return nil
}

// exited says whether the process of a pidfd has ended, waiting at most d for it.
func exited(pidfd int, d time.Duration) bool {
	n, _ := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(d.Milliseconds()))
	return n > 0
}

// poll calls f every few milliseconds until it returns true or ctx ends.
func poll(ctx context.Context, every time.Duration, f func() bool) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if f() {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
