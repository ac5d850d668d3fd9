package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	cpuDir    = "/sys/devices/system/cpu"
	memoryDir = "/sys/devices/system/memory"
)

// OnlineCPUMem puts to use what the host has plugged in, and waits until as many processors as it
// says are there: the shim never asks for the wait, and counts on it. Memory that arrives later comes
// online by itself (bringUp), and containers may use each processor that does.
func (a *agent) OnlineCPUMem(ctx context.Context, req *pb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	if !req.CpuOnly {
		if err := needMemoryDriver("/sys/bus/virtio/devices"); err != nil {
			return nil, err
		}
		if _, err := bringOnline(memoryDir, "memory"); err != nil {
			return nil, err
		}
	}
	var online uint32
	err := plugged(ctx, func() (err error) {
		if online, err = bringOnline(cpuDir, "cpu"); err != nil {
			return err
		}
		if online < req.NbCpus {
			return errNotYet
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%d of %d processors are online: %w", online, req.NbCpus, err)
	}
	return &emptypb.Empty{}, nil
}

// bringOnline turns on each unit of a kind below a directory of sysfs, such as cpu0 or memory32, and
// returns how many are on. One that cannot be turned off has no switch.
func bringOnline(sysfs, kind string) (uint32, error) {
	dirs, err := filepath.Glob(filepath.Join(sysfs, kind+"[0-9]*"))
	if err != nil {
		return 0, err
	}
	var online uint32
	for _, dir := range dirs {
		file := filepath.Join(dir, "online")
		state, err := os.ReadFile(file)
		switch {
		case errors.Is(err, os.ErrNotExist) || strings.TrimSpace(string(state)) == "1":
			online++
		case err != nil:
			return online, err
		// One that the machine is about to take back, or has not quite yet, stays off.
		case os.WriteFile(file, []byte("1"), 0) == nil:
			online++
		}
	}
	return online, nil
}

// virtioMemory is the number of the device in the virtio specification.
const virtioMemory = "0x0018"

// needMemoryDriver loads the driver of a machine that grows by virtio-mem.
func needMemoryDriver(sysfs string) error {
	ids, err := filepath.Glob(filepath.Join(sysfs, "*", "device"))
	if err != nil {
		return err
	}
	for _, file := range ids {
		if id, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(id)) == virtioMemory {
			return needModule("virtio_mem", "")
		}
	}
	return nil
}

// probeFile is where a kernel without ACPI learns of new memory. GetGuestDetails says whether this one
// has it.
const probeFile = memoryDir + "/probe"

// MemHotplugByProbe tells the kernel where new memory is, block by block.
func (a *agent) MemHotplugByProbe(_ context.Context, req *pb.MemHotplugByProbeRequest) (*emptypb.Empty, error) {
	if _, err := os.Stat(probeFile); err != nil {
		return nil, fmt.Errorf("this guest's kernel finds memory by itself: %w", errdefs.ErrNotImplemented)
	}
	for _, address := range req.MemHotplugProbeAddr {
		err := os.WriteFile(probeFile, fmt.Appendf(nil, "%#x", address), 0)
		if err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("probe memory at %#x: %w", address, err)
		}
	}
	return &emptypb.Empty{}, nil
}
