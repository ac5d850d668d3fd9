package guestagent

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// What the host asks of the machine as a whole.

const (
	// agentVersion is the release of Kata's protocols that the agent speaks.
	agentVersion = "3.20.0"
	// copyRoot is below which the host may put files.
	copyRoot = "/run/kata-containers"
	// powerOffDelay leaves the host time to take the answer and stop the machine itself.
	powerOffDelay = 5 * time.Second
	// maxSeed bounds the data of one ReseedRandomDev.
	maxSeed = 4096
	// cpuLimit bounds the wait for a hot-plugged processor.
	cpuLimit = 5 * time.Second
)

func powerOffSoon() { time.AfterFunc(powerOffDelay, powerOff) }

// GetGuestDetails says what this guest can do.
func (a *agent) GetGuestDetails(context.Context, *pb.GuestDetailsRequest) (*pb.GuestDetailsResponse, error) {
	var block uint64
	if data, err := os.ReadFile("/sys/devices/system/memory/block_size_bytes"); err == nil {
		block, _ = strconv.ParseUint(strings.TrimSpace(string(data)), 16, 64)
	}
	return &pb.GuestDetailsResponse{
		MemBlockSizeBytes: block,
		AgentDetails: &pb.AgentDetails{
			Version:         agentVersion,
			InitDaemon:      true,
			StorageHandlers: storageDrivers,
		},
	}, nil
}

// ReseedRandomDev makes the kernel's random numbers depend on data, at once: two guests that were
// restored from one image must never draw the same.
func (a *agent) ReseedRandomDev(_ context.Context, req *pb.ReseedRandomDevRequest) (*emptypb.Empty, error) {
	if len(req.Data) == 0 || len(req.Data) > maxSeed {
		return nil, invalid("seed of %d bytes", len(req.Data))
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
		return nil, invalid("time %d s %d µs", req.Sec, req.Usec)
	}
	tv := unix.Timeval{Sec: req.Sec, Usec: req.Usec}
	if err := unix.Settimeofday(&tv); err != nil {
		return nil, fmt.Errorf("set clock: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// OnlineCPUMem puts hot-plugged processors to use; memory comes online by itself (bringUp).
func (a *agent) OnlineCPUMem(ctx context.Context, req *pb.OnlineCPUMemRequest) (*emptypb.Empty, error) {
	ctx, cancel := context.WithTimeout(ctx, cpuLimit)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		online, err := onlineProcessors("/sys/devices/system/cpu")
		if err != nil {
			return nil, err
		}
		if !req.Wait || online >= req.NbCpus {
			return &emptypb.Empty{}, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d processors appeared: %w", online, req.NbCpus, ctx.Err())
		}
	}
}

// onlineProcessors turns on every processor below a sysfs directory and returns how many there
// are. One that cannot be turned off has no switch.
func onlineProcessors(sysfs string) (uint32, error) {
	dirs, err := filepath.Glob(sysfs + "/cpu[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		state, err := os.ReadFile(dir + "/online")
		if err != nil || strings.TrimSpace(string(state)) == "1" {
			continue
		}
		if err := os.WriteFile(dir+"/online", []byte("1"), 0); err != nil {
			return 0, fmt.Errorf("bring %s online: %w", filepath.Base(dir), err)
		}
	}
	return uint32(len(dirs)), nil
}

// GetMetrics returns the guest's memory, load and uptime as Prometheus reads them.
func (a *agent) GetMetrics(context.Context, *pb.GetMetricsRequest) (*pb.Metrics, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b strings.Builder
	b.WriteString("# TYPE kata_guest_meminfo gauge\n")
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, kib, ok := parseMeminfo(lines.Text())
		if ok {
			fmt.Fprintf(&b, "kata_guest_meminfo{item=%q} %d\n", name, kib)
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	fmt.Fprintf(&b, "# TYPE kata_guest_load gauge\n")
	for i, item := range []string{"load1", "load5", "load15"} {
		fmt.Fprintf(&b, "kata_guest_load{item=%q} %.2f\n", item, float64(info.Loads[i])/(1<<16))
	}
	fmt.Fprintf(&b, "# TYPE kata_guest_uptime_seconds counter\nkata_guest_uptime_seconds %d\n", info.Uptime)
	return &pb.Metrics{Metrics: b.String()}, nil
}

// parseMeminfo reads a line such as "MemFree:  123 kB".
func parseMeminfo(line string) (name string, kib uint64, ok bool) {
	name, rest, ok := strings.Cut(line, ":")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return "", 0, false
	}
	kib, err := strconv.ParseUint(fields[0], 10, 64)
	return name, kib, err == nil
}

// CopyFile puts a file, a directory or a link into the guest. A large file comes in parts, and
// gets its name with the last one.
func (a *agent) CopyFile(_ context.Context, req *pb.CopyFileRequest) (*emptypb.Empty, error) {
	path := filepath.Clean(req.Path)
	if path != req.Path || !strings.HasPrefix(path, copyRoot+"/") {
		return nil, invalid("path %q is not below %s", req.Path, copyRoot)
	}
	end := req.Offset + int64(len(req.Data))
	if req.Offset < 0 || req.FileSize < 0 || end < req.Offset {
		return nil, invalid("bytes %d to %d of %d", req.Offset, end, req.FileSize)
	}
	dirMode := os.FileMode(req.DirMode & 0o777)
	if dirMode == 0 {
		dirMode = 0o750
	}
	if err := os.MkdirAll(filepath.Dir(path), dirMode); err != nil {
		return nil, err
	}
	switch req.FileMode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := os.Mkdir(path, 0o700); err != nil && !os.IsExist(err) {
			return nil, err
		}
	case unix.S_IFLNK:
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		if err := os.Symlink(string(req.Data), path); err != nil {
			return nil, err
		}
		return done(os.Lchown(path, int(req.Uid), int(req.Gid)))
	case unix.S_IFREG:
		if end > req.FileSize {
			return nil, invalid("bytes %d to %d of %d", req.Offset, end, req.FileSize)
		}
		complete, err := writePart(path+".part", req)
		if err != nil || !complete {
			return done(err)
		}
		if err := os.Rename(path+".part", path); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("file mode %#o: %w", req.FileMode, errdefs.ErrInvalidArgument)
	}
	if err := os.Chown(path, int(req.Uid), int(req.Gid)); err != nil {
		return nil, err
	}
	return done(unix.Chmod(path, req.FileMode&0o7777))
}

func writePart(path string, req *pb.CopyFileRequest) (complete bool, err error) {
	flags := os.O_WRONLY | os.O_CREATE
	if req.Offset == 0 {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return false, err
	}
	_, err = f.WriteAt(req.Data, req.Offset)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	return req.Offset+int64(len(req.Data)) == req.FileSize, err
}
