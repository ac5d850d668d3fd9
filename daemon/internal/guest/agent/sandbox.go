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
	// maxDNS is the maximum size in bytes of the DNS configuration in a CreateSandbox request.
	maxDNS = 64 << 10
	// killTimeout bounds the wait for the containers' processes to exit when the sandbox is stopped.
	killTimeout = 5 * time.Second
	// syncTimeout bounds the wait for data to be written to the disks before the machine is powered off.
	syncTimeout = 5 * time.Second
	// powerOffDelay gives the host time to receive the response and stop the machine itself.
	powerOffDelay = 5 * time.Second
)

// CreateSandbox sets up the hostname, DNS and the sandbox's storages, which all containers share.
func (a *agent) CreateSandbox(ctx context.Context, req *pb.CreateSandboxRequest) (*emptypb.Empty, error) {
	if req.GuestHookPath != "" {
		return nil, fmt.Errorf("guest_hook_path %q: this guest runs no hooks; remove it from Kata's configuration: %w", req.GuestHookPath, refusal.ErrUnsupported)
	}
	if len(req.KernelModules) > 0 {
		return nil, fmt.Errorf("kernel_modules: this guest loads only the modules of its image; remove them from Kata's configuration: %w", refusal.ErrUnsupported)
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
	return emptyResponse(err)
}

// writeResolvConf writes lines to the file resolv.conf in dir, which the guest's programs use to resolve names.
// Without lines, it writes no file.
func writeResolvConf(dir string, lines []string) error {
	content := strings.TrimRight(strings.Join(lines, "\n"), "\n")
	if len(content) > maxDNS || strings.ContainsRune(content, 0) {
		return refusal.Invalid("DNS configuration of %d bytes is longer than %d or contains a NUL byte", len(content), maxDNS)
	}
	if content == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(dir+"/resolv.conf", []byte(content+"\n"), 0o644)
}

// GetOOMEvent waits until the kernel kills a process of a container because it ran out of memory, and returns the
// container's id.
func (a *agent) GetOOMEvent(ctx context.Context, _ *pb.GetOOMEventRequest) (*pb.OOMEvent, error) {
	select {
	case id := <-a.oom:
		if ctx.Err() != nil {
			a.reportOOM(id) // keep the event for the next caller
			return nil, ctx.Err()
		}
		return &pb.OOMEvent{ContainerId: id}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// reportOOM queues an event for GetOOMEvent. If the queue is full, it drops the event.
func (a *agent) reportOOM(id string) {
	select {
	case a.oom <- id:
	default:
	}
}

// DestroySandbox stops all containers. The host is expected to stop the machine next. If it does not, the machine powers
// itself off after powerOffDelay.
func (a *agent) DestroySandbox(context.Context, *pb.DestroySandboxRequest) (*emptypb.Empty, error) {
	time.AfterFunc(killTimeout+syncTimeout+powerOffDelay, powerOff) // in case stopSandbox hangs
	err := a.stopSandbox()
	time.AfterFunc(powerOffDelay, powerOff)
	return emptyResponse(err)
}

// stopSandbox kills all containers and unmounts all storages, so that the file systems on the host's disks are
// consistent.
func (a *agent) stopSandbox() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var errs []error
	for _, c := range a.containers {
		errs = append(errs, c.Kill())
	}
	for end := time.Now().Add(killTimeout); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		running := false
		for _, c := range a.containers {
			running = running || !c.Empty()
		}
		if !running {
			break
		}
	}
	return errors.Join(append(errs, a.storages.RemoveAll())...)
}

// powerOff syncs the disks, for at most syncTimeout, and powers the machine off. It never returns. This way a VM
// ends even if the host no longer knows about it.
func powerOff() {
	synced := make(chan struct{})
	go func() {
		unix.Sync()
		close(synced)
	}()
	select {
	case <-synced:
	case <-time.After(syncTimeout):
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	for {
		time.Sleep(time.Hour) // if PID 1 exited, the kernel would panic
	}
}
