package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Each QEMU has a cgroup, so that a guest can take no more of the host than its sandbox was given, whatever it does to its
// QEMU. Kata's shim has another cgroup for the sandbox.

const (
	// cgroupParent is the cgroup of all sandboxes.
	cgroupParent = "/msb"
	cgroupMount  = "/sys/fs/cgroup"
	// cpuHeadroom is the processor time that QEMU may use besides that of the guest's processors, in processors. It is
	// for its disks and sockets.
	cpuHeadroom = 0.5
	// qemuMemoryMiB is the memory that QEMU itself may use, besides the guest's memory and 1/128 of it for page tables.
	// translationMiB is what it may use in addition to translate the guest's code for another processor.
	qemuMemoryMiB  = 192
	translationMiB = 256
	// maxThreads is how many threads QEMU may have besides one for each processor: it uses up to 64 for each disk.
	maxThreads = 160
	// buildShares is the weight of the build of a template when the host is busy. A sandbox has 1024 (100 with cgroup v2, where
	// this is converted to 4).
	buildShares = 100
)

// newCgroup creates the cgroup of the QEMU of the VM st. It returns a function that adds a process to it.
//
// A clone may need its memory twice: when it first writes to a page that its template has not used, Linux allocates the page in
// the template's memory as well, and charges both to the clone. Later clones do not allocate it again.
func newCgroup(st state, accelerator string, mem memory) (add func(pid int) error, err error) {
	memory := int64(st.guestMemoryMiB() + st.guestMemoryMiB()/128 + qemuMemoryMiB)
	if accelerator == "tcg" {
		memory += translationMiB
	}
	if mem.isClone() {
		memory += int64(st.guestMemoryMiB())
	}
	memory <<= 20
	period := uint64(100_000)
	quota := int64((float64(st.VCPUs) + cpuHeadroom) * float64(period))
	limits := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Quota: &quota, Period: &period},
		Memory: &specs.LinuxMemory{Limit: &memory},
		Pids:   &specs.LinuxPids{Limit: int64(st.VCPUs + maxThreads)},
	}
	if mem.isTemplate() {
		limits.CPU.Shares = new(uint64(buildShares))
	}
	name := path.Join(cgroupParent, st.ID)
	if cgroups.Mode() == cgroups.Unified {
		var group *cgroup2.Manager
		if group, err = cgroup2.NewManager(cgroupMount, name, cgroup2.ToResources(limits)); err == nil {
			add = func(pid int) error { return group.AddProc(uint64(pid)) }
		}
	} else {
		var group cgroup1.Cgroup
		if group, err = cgroup1.New(cgroup1.StaticPath(name), limits, cgroup1.WithHiearchy(controllers)); err == nil {
			add = func(pid int) error { return group.AddProc(uint64(pid)) }
		}
	}
	if err == nil {
		err = forbidSwap(st.ID, memory)
	}
	if err != nil {
		return nil, fmt.Errorf("create the cgroup of QEMU: %w", err)
	}
	return add, nil
}

// forbidSwap limits memory and swap of VM id together to memory, in bytes, if the kernel accounts for swap.
func forbidSwap(id string, memory int64) error {
	for _, dir := range cgroupDirs(id) {
		for file, value := range map[string]int64{"memory.swap.max": 0, "memory.memsw.limit_in_bytes": memory} { // of v2 and v1
			err := os.WriteFile(filepath.Join(dir, file), []byte(strconv.FormatInt(value, 10)), 0)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
				return err
			}
		}
	}
	return nil
}

// controllers returns the controllers of cgroup v1 that limit QEMU.
func controllers() ([]cgroup1.Subsystem, error) {
	all, err := cgroup1.Default()
	return slices.DeleteFunc(all, func(s cgroup1.Subsystem) bool {
		return !slices.Contains([]cgroup1.Name{cgroup1.Cpu, cgroup1.Cpuacct, cgroup1.Memory, cgroup1.Pids}, s.Name())
	}), err
}

// cgroupDirs returns the directories of the cgroup of VM id: one with cgroup v2, and one for each controller with v1.
func cgroupDirs(id string) (dirs []string) {
	for _, root := range []string{cgroupMount, cgroupMount + "/*"} {
		found, _ := filepath.Glob(filepath.Join(root, cgroupParent, id)) // this pattern is never malformed
		dirs = append(dirs, found...)
	}
	return dirs
}

// cgroupMembers returns the pids of the processes in the cgroup of VM id.
func cgroupMembers(id string) (pids []int) {
	for _, dir := range cgroupDirs(id) {
		procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // fails if it was just removed, and then it has no members
		for field := range strings.FieldsSeq(string(procs)) {
			if pid, err := strconv.Atoi(field); err == nil && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// outOfMemory reports whether the kernel has killed the QEMU of VM id because it reached its memory limit.
func outOfMemory(id string) bool {
	for _, dir := range cgroupDirs(id) {
		for _, file := range []string{"memory.events", "memory.oom_control"} { // of cgroup v2 and v1
			events, _ := os.ReadFile(filepath.Join(dir, file))
			if killsRE.Match(events) {
				return true
			}
		}
	}
	return false
}

var killsRE = regexp.MustCompile(`(?m)^oom_kill [1-9]`)

// removeCgroup removes the cgroup of VM id, if it exists. The VM's processes must have ended.
func removeCgroup(ctx context.Context, id string) error {
	for _, dir := range cgroupDirs(id) {
		if err := RemoveCgroup(ctx, dir); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroup removes the cgroup with the directory top, and those below it. Their processes must have ended.
func RemoveCgroup(ctx context.Context, top string) error {
	var tree []string
	_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			tree = append(tree, path)
		}
		return nil
	})
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for _, dir := range slices.Backward(tree) { // children first
		err := unix.Rmdir(dir)
		for errors.Is(err, unix.EBUSY) { // a cgroup stays busy for a moment after its last process has ended
			select {
			case <-tick.C:
				err = unix.Rmdir(dir)
			case <-ctx.Done():
				err = context.Cause(ctx)
			}
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove the cgroup %s: %w", dir, err)
		}
	}
	return nil
}
