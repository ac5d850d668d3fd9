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

// KVM's constants and ioctl numbers on x86-64, from linux/kvm.h.
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

// probeProgram counts down from 20 million in 16-bit mode. It executes 40 million instructions, which must finish
// within probeTimeout. That is 80 MIPS.
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

// probeKVM runs probeProgram on a vCPU. If that takes longer than probeTimeout, it exits this process.
func probeKVM() error {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	var errs []error
	ioctl := func(action string, fd, request int, arg unsafe.Pointer) int {
		for {
			r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg))
			if errno == unix.EINTR {
				continue // the Go runtime signals its threads
			}
			if errno != 0 {
				errs = append(errs, fmt.Errorf("%s: %w", action, errno))
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
	if err := unix.IoctlSetInt(vm, kvmSetTSSAddr, 0xfffbd000); err != nil { // Intel processors need it
		errs = append(errs, fmt.Errorf("set the address of the task state segment: %w", err))
	}
	ioctl("set the VM's memory", vm, kvmSetUserMemoryRegion, unsafe.Pointer(&region))
	vcpu := ioctl("create a vCPU", vm, kvmCreateVCPU, nil)
	runSize := ioctl("get the size of the vCPU's page", kvm, kvmGetVCPUMmapSize, nil)
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
	watchdog := time.AfterFunc(probeTimeout, func() { // a running vCPU stops only when its process exits
		fmt.Fprintf(os.Stderr, "the vCPU did not finish within %v\n", probeTimeout)
		os.Exit(1)
	})
	defer watchdog.Stop()
	ioctl("run the vCPU", vcpu, kvmRun, nil)
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if reason := binary.LittleEndian.Uint32(run[8:]); reason != kvmExitHLT { // kvm_run.exit_reason
		return fmt.Errorf("the vCPU stopped with exit reason %d, want %d (hlt)", reason, kvmExitHLT)
	}
	return nil
}
