package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KVM's ioctls on x86-64, from linux/kvm.h.
const (
	kvmAPIVersion = 12

	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetTSSAddr          = 0xae47
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitHLT = 5
)

// probeProgram counts to 20 million in 16-bit mode. The 40 million instructions must be done within
// probeLimit: that is 80 MIPS.
var probeProgram = []byte{
	0x66, 0xb9, 0x00, 0x2d, 0x31, 0x01, // mov ecx, 20000000
	0x66, 0x49, // dec ecx
	0x75, 0xfc, // jnz to the dec
	0xf4, // hlt
}

type kvmMemoryRegion struct {
	slot, flags     uint32
	guestPhysical   uint64
	size, userspace uint64
}

// probeKVM runs probeProgram on a vCPU. When that takes too long, it ends this process.
func probeKVM() error {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	var errs []error
	ioctl := func(what string, fd, request int, arg unsafe.Pointer) int {
		for {
			r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
			if errno == unix.EINTR {
				continue // the Go runtime signals its threads
			}
			if errno != 0 {
				errs = append(errs, fmt.Errorf("%s: %w", what, errno))
			}
			return int(r)
		}
	}
	vm := ioctl("create a VM", kvm, kvmCreateVM, nil)
	const loadAddress, memorySize = 0x1000, 0x2000
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("map the VM's memory: %w", err)
	}
	copy(memory[loadAddress:], probeProgram)
	region := kvmMemoryRegion{size: memorySize, userspace: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if err := unix.IoctlSetInt(vm, kvmSetTSSAddr, 0xfffbd000); err != nil { // Intel needs it
		errs = append(errs, fmt.Errorf("place the task state segment: %w", err))
	}
	ioctl("give the VM memory", vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region))
	vcpu := ioctl("create a vCPU", vm, kvmCreateVCPU, nil)
	runSize := ioctl("size the vCPU's page", kvm, kvmGetVCPUMmapSize, nil)
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	run, err := unix.Mmap(vcpu, 0, runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map the vCPU's page: %w", err)
	}

	var sregs [312]byte // struct kvm_sregs, which begins with cs: base, limit, selector
	ioctl("read the segments", vcpu, kvmGetSregs, unsafe.Pointer(&sregs))
	binary.LittleEndian.PutUint64(sregs[0:], 0)  // cs.base
	binary.LittleEndian.PutUint16(sregs[12:], 0) // cs.selector
	ioctl("set the segments", vcpu, kvmSetSregs, unsafe.Pointer(&sregs))
	var regs [18]uint64                 // struct kvm_regs: 16 general registers, rip, rflags
	regs[16], regs[17] = loadAddress, 2 // bit 1 of rflags is always set
	ioctl("set the registers", vcpu, kvmSetRegs, unsafe.Pointer(&regs))
	late := time.AfterFunc(probeLimit, func() { // only the end of its process stops a vCPU
		fmt.Fprintf(os.Stderr, "the vCPU runs for more than %v\n", probeLimit)
		os.Exit(1)
	})
	defer late.Stop()
	ioctl("run the vCPU", vcpu, kvmRun, nil)
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if reason := binary.LittleEndian.Uint32(run[8:]); reason != kvmExitHLT { // kvm_run.exit_reason
		return fmt.Errorf("the vCPU stopped for reason %d, not at its hlt", reason)
	}
	return nil
}
