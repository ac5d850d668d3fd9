package container

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socketRules keep a container's processes from vsock, over which they could call the host's listeners: it knows no
// network namespace, and no device to leave out where Kata's shim calls the agent by it. Each is one way to a socket,
// in the numbers of each ABI of the guest's processors.
var socketRules = []socketRule{
	{unix.AUDIT_ARCH_X86_64, 41, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_I386, 359, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_I386, 102, 1, unix.ENOSYS}, // socketcall(SYS_SOCKET): a filter does not see its arguments
	{unix.AUDIT_ARCH_AARCH64, 198, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_ARM, 281, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	// io_uring_setup: a ring can make sockets, and its operations pass no filter.
	{unix.AUDIT_ARCH_X86_64, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_I386, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_AARCH64, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_ARM, 425, anyArgument, unix.ENOSYS},
}

// socketRule refuses a system call.
type socketRule struct {
	abi    uint32 // AUDIT_ARCH_*
	number uint32
	first  int // the argument that is refused
	errno  unix.Errno
}

const anyArgument = -1

// filterSockets holds this thread, and what it becomes and starts, to socketRules. Without no_new_privs it needs
// CAP_SYS_ADMIN.
func filterSockets() error {
	program := socketProgram(socketRules)
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter)), 0, 0); err != nil {
		return fmt.Errorf("filter sockets: %w", err)
	}
	return nil
}

// socketProgram translates rules to a program over struct seccomp_data of <linux/seccomp.h>.
func socketProgram(rules []socketRule) []unix.SockFilter {
	const (
		number, abi, firstArgument = 0, 4, 16
		// x32 marks the calls of that ABI, which shares x86-64's numbers for all that is here.
		x32 = 0x40000000
	)
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	answer := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	equal := func(value uint32) unix.SockFilter { // jumps out of the rule where it is not
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value}
	}
	var program []unix.SockFilter
	for _, r := range rules {
		body := []unix.SockFilter{
			load(abi), equal(r.abi),
			load(number), {Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: ^uint32(x32)}, equal(r.number),
		}
		if r.first != anyArgument {
			body = append(body, load(firstArgument), equal(uint32(r.first))) // an int: the lower half
		}
		body = append(body, answer(unix.SECCOMP_RET_ERRNO|uint32(r.errno)))
		for n := range body {
			if body[n].Code&7 == unix.BPF_JMP {
				body[n].Jf = uint8(len(body) - n - 1)
			}
		}
		program = append(program, body...)
	}
	return append(program, answer(unix.SECCOMP_RET_ALLOW))
}
