// Package socketfilter keeps a program from opening vsock sockets. It is in sys because the guest's agent filters the
// programs of containers, and package hypervisor filters QEMU.
package socketfilter

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rules keep a program from opening vsock sockets, because vsock ignores network namespaces. In a guest, a program could
// connect to listeners on the host, and the device cannot be removed if Kata's shim uses it to call the agent. On the
// host, a program could call the agents of guests. There is a rule for each system call that can open a socket, with its
// number in each ABI that the processors support.
var rules = []rule{
	{unix.AUDIT_ARCH_X86_64, 41, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_I386, 359, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_I386, 102, 1, unix.ENOSYS}, // socketcall(SYS_SOCKET), whose arguments a filter cannot see
	{unix.AUDIT_ARCH_AARCH64, 198, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	{unix.AUDIT_ARCH_ARM, 281, unix.AF_VSOCK, unix.EAFNOSUPPORT},
	// io_uring_setup: io_uring can open sockets, and seccomp does not filter its operations.
	{unix.AUDIT_ARCH_X86_64, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_I386, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_AARCH64, 425, anyArgument, unix.ENOSYS},
	{unix.AUDIT_ARCH_ARM, 425, anyArgument, unix.ENOSYS},
}

// A rule makes a system call fail with errno if its first argument matches.
type rule struct {
	abi    uint32 // AUDIT_ARCH_*
	number uint32 // of the system call
	first  int    // the first argument, or anyArgument
	errno  unix.Errno
}

const anyArgument = -1

// Apply applies the filter to this thread, to the program that it execs and to their children. It needs no_new_privs or
// CAP_SYS_ADMIN.
func Apply() error {
	program := translate(rules)
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&filter)), 0, 0); err != nil {
		return fmt.Errorf("filter sockets: %w", err)
	}
	return nil
}

// translate translates rules to a BPF program, whose input is a struct seccomp_data of <linux/seccomp.h>.
func translate(rules []rule) []unix.SockFilter {
	const (
		number, abi, firstArgument = 0, 4, 16
		// x32 is the bit that marks system calls of the x32 ABI. The calls in rules have the same numbers in it as
		// in the x86-64 ABI.
		x32 = 0x40000000
	)
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	returnAction := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	requireEqual := func(value uint32) unix.SockFilter { // jumps to the next rule if the values differ
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value}
	}
	var program []unix.SockFilter
	for _, r := range rules {
		body := []unix.SockFilter{
			load(abi), requireEqual(r.abi),
			load(number), {Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: ^uint32(x32)}, requireEqual(r.number),
		}
		if r.first != anyArgument {
			// The argument is an int, so only the lower half of the 64-bit value counts.
			body = append(body, load(firstArgument), requireEqual(uint32(r.first)))
		}
		body = append(body, returnAction(unix.SECCOMP_RET_ERRNO|uint32(r.errno)))
		for n := range body {
			if body[n].Code&7 == unix.BPF_JMP {
				body[n].Jf = uint8(len(body) - n - 1)
			}
		}
		program = append(program, body...)
	}
	return append(program, returnAction(unix.SECCOMP_RET_ALLOW))
}
