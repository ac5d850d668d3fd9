package agent

import (
	"context"
	"fmt"
	"os"
	"unsafe"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
	"github.com/msbd/msbd/daemon/internal/guest/agent/storage"
)

// What the host asks of the machine as a whole.

const (
	// agentVersion is the release of Kata's protocols that the agent speaks.
	agentVersion = "3.20.0"
	// maxSeed bounds the data of one ReseedRandomDev.
	maxSeed = 4096
)

// GetGuestDetails returns what this guest supports. It takes no seccomp profiles and no devices, and its
// memory does not grow.
func (a *agent) GetGuestDetails(context.Context, *pb.GuestDetailsRequest) (*pb.GuestDetailsResponse, error) {
	return &pb.GuestDetailsResponse{AgentDetails: &pb.AgentDetails{
		Version:         agentVersion,
		InitDaemon:      true,
		StorageHandlers: storage.Drivers(),
	}}, nil
}

// ReseedRandomDev makes the kernel's random numbers depend on data, at once: two guests that were
// restored from one image must never draw the same.
func (a *agent) ReseedRandomDev(_ context.Context, req *pb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	if len(req.Data) == 0 || len(req.Data) > maxSeed {
		return nil, refusal.Invalid("seed of %d bytes", len(req.Data))
	}
	return done(reseed(req.Data))
}

func reseed(data []byte) error {
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

// SetGuestDateTime sets the clock.
func (a *agent) SetGuestDateTime(_ context.Context, req *pb.SetGuestDateTimeRequest) (*emptypb.Empty, error) {
	if req.Sec <= 0 || req.Usec < 0 || req.Usec >= 1_000_000 {
		return nil, refusal.Invalid("time %d s %d µs", req.Sec, req.Usec)
	}
	tv := unix.Timeval{Sec: req.Sec, Usec: req.Usec}
	if err := unix.Settimeofday(&tv); err != nil {
		return nil, fmt.Errorf("set clock: %w", err)
	}
	return &emptypb.Empty{}, nil
}
