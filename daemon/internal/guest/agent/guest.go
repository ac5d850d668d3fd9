package agent

import (
	"context"
	"fmt"
	"os"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// This file handles the requests that concern the machine, such as setting its clock. Those of the control port are methods of
// control.Guest.

const (
	// agentVersion is the Kata release whose protocol the agent implements.
	agentVersion = "3.20.0"
	// maxSeed is the maximum number of bytes in one ReseedRandomDev request.
	maxSeed = 4096
)

// GetGuestDetails returns the features of this guest. It supports no seccomp profiles, no devices and no memory hotplug.
func (a *agent) GetGuestDetails(context.Context, *pb.GuestDetailsRequest) (*pb.GuestDetailsResponse, error) {
	return &pb.GuestDetailsResponse{AgentDetails: &pb.AgentDetails{
		Version:         agentVersion,
		InitDaemon:      true,
		StorageHandlers: storage.Drivers(),
	}}, nil
}

// ReseedRandomDev adds data to the kernel's random number generator and reseeds it immediately. Otherwise two guests
// that were restored from the same snapshot would generate the same random numbers.
func (a *agent) ReseedRandomDev(_ context.Context, req *pb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	if len(req.Data) == 0 || len(req.Data) > maxSeed {
		return nil, refusal.Invalid("seed of %d bytes: want 1 to %d", len(req.Data), maxSeed)
	}
	return emptyResponse(a.Reseed(req.Data))
}

// Reseed adds data to the kernel's random number generator and reseeds it immediately.
func (a *agent) Reseed(data []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info of <linux/random.h>
	var info struct {
		entropyBits int32
		size        int32
		data        [maxSeed]byte
	}
	info.entropyBits, info.size = int32(8*len(data)), int32(len(data))
	copy(info.data[:], data)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0); err != nil {
		return fmt.Errorf("reseed: %w", err)
	}
	return nil
}

// SetGuestDateTime sets the guest's clock. If the host also uses the control port (see package control), it is soon
// corrected again.
func (a *agent) SetGuestDateTime(_ context.Context, req *pb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.Sec <= 0 || req.Usec < 0 || req.Usec >= 1_000_000 {
		return nil, refusal.Invalid("invalid time: %d s and %d µs", req.Sec, req.Usec)
	}
	tv := unix.Timeval{Sec: req.Sec, Usec: req.Usec}
	if err := unix.Settimeofday(&tv); err != nil {
		return nil, fmt.Errorf("set clock: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// SetToken sets the token with which msbd connects to the portal. In a guest that was restored from a template, it also drops
// what is left of the connection of the template's builder, before the shim connects.
func (a *agent) SetToken(token string) error {
	if a.gate == nil {
		return errNoLink
	}
	a.gate.SetToken(token)
	if a.restored() {
		a.hangUp()
	}
	return nil
}

// AwaitPortal waits for up to timeout until the portal takes connections, and reports whether it does.
func (a *agent) AwaitPortal(timeout time.Duration) (bool, error) {
	if a.gate == nil {
		return false, errNoLink
	}
	return a.gate.AwaitReady(timeout), nil
}

var errNoLink = fmt.Errorf("the guest has no network interface to the host: %w", errdefs.ErrFailedPrecondition)

// SetHostname sets the hostname of the sandbox's container.
func (a *agent) SetHostname(name string) error {
	a.mu.Lock()
	var containers []*containerEntry
	for _, c := range a.containers {
		containers = append(containers, c)
	}
	a.mu.Unlock()
	if len(containers) != 1 {
		return fmt.Errorf("set the hostname: the guest has %d containers: %w", len(containers), errdefs.ErrFailedPrecondition)
	}
	return containers[0].SetHostname(name)
}
