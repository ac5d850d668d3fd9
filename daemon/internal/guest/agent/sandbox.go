package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

const (
	// maxDNS bounds the lines of one CreateSandbox together.
	maxDNS = 64 << 10
	// killLimit bounds the wait for the containers at the end of the sandbox.
	killLimit = 5 * time.Second
	// syncLimit bounds the wait for the disks at the end of the machine.
	syncLimit = 5 * time.Second
	// powerOffDelay leaves the host time to take the answer and stop the machine itself.
	powerOffDelay = 5 * time.Second
)

// CreateSandbox prepares what all containers share.
func (a *agent) CreateSandbox(ctx context.Context, req *pb.CreateSandboxRequest) (*emptypb.Empty, error) {
	if req.GuestHookPath != "" {
		return nil, fmt.Errorf("guest_hook_path %q: this guest runs no hooks, leave it out of Kata's configuration: %w", req.GuestHookPath, refusal.ErrUnsupported)
	}
	if len(req.KernelModules) > 0 {
		return nil, fmt.Errorf("kernel_modules: this guest loads its own only, leave them out of Kata's configuration: %w", refusal.ErrUnsupported)
	}
	if h := req.Hostname; h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return nil, refusal.Invalid("hostname %q: %v", h, err)
		}
	}
	if err := writeResolvConf("/etc", req.Dns); err != nil {
		return nil, err
	}
	_, err := a.storages.Add(ctx, req.Storages)
	return done(err)
}

// writeResolvConf makes the file that the guest's own programs resolve names by, of its lines.
func writeResolvConf(dir string, lines []string) error {
	content := strings.TrimRight(strings.Join(lines, "\n"), "\n")
	if len(content) > maxDNS || strings.ContainsRune(content, 0) {
		return refusal.Invalid("DNS configuration of %d bytes", len(content))
	}
	if content == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(dir+"/resolv.conf", []byte(content+"\n"), 0o644)
}

// GetOOMEvent waits until the kernel kills a container's process because memory ran out.
func (a *agent) GetOOMEvent(ctx context.Context, _ *pb.GetOOMEventRequest) (*pb.OOMEvent, error) {
	select {
	case id := <-a.oom:
		if ctx.Err() != nil {
			a.reportOOM(id) // both were ready: the next caller takes it
			return nil, ctx.Err()
		}
		return &pb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// reportOOM queues an event. While nobody listens, it keeps only the oldest.
func (a *agent) reportOOM(id string) {
	select {
	case a.oom <- id:
	default:
	}
}

// DestroySandbox ends all containers. The host stops the machine next; if it does not, the machine
// stops itself.
func (a *agent) DestroySandbox(context.Context, *pb.DestroySandboxRequest) (*emptypb.Empty, error) {
	time.AfterFunc(killLimit+syncLimit+powerOffDelay, powerOff) // whatever hangs
	err := a.endSandbox()
	time.AfterFunc(powerOffDelay, powerOff)
	return done(err)
}

// endSandbox ends all containers and unmounts their storages, so that the host's disks are consistent.
func (a *agent) endSandbox() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, c := range a.containers {
		errs = append(errs, c.Kill())
	}
	for end := time.Now().Add(killLimit); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		left := false
		for _, c := range a.containers {
			left = left || !c.Empty()
		}
		if !left {
			break
		}
	}
	return errors.Join(append(errs, a.storages.RemoveAll())...)
}

// powerOff ends the guest. A VM that the host lost track of must not outlive its use.
func powerOff() {
	written := make(chan struct{})
	go func() {
		unix.Sync()
		close(written)
	}()
	select {
	case <-written:
	case <-time.After(syncLimit):
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	for {
		time.Sleep(time.Hour) // returning would panic the kernel
	}
}
