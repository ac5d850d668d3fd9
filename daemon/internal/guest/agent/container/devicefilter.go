package container

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

// anyNumber matches every major or minor number.
const anyNumber = -1

// maxDeviceRules is the maximum number of rules in a filter. The kernel accepts programs of up to a million instructions;
// a legitimate spec needs a few hundred.
const maxDeviceRules = 1024

// defaultDevices are the rules for every container. A container may create any device node, and may open harmless
// devices and terminals. Other runtimes have the same rules, except that they allow the console. Here, the console is
// the guest's, whose output the host keeps. A terminal that is bound to /dev/console is a pts.
var defaultDevices = []*pb.LinuxDeviceCgroup{
	{Allow: true, Type: "c", Major: anyNumber, Minor: anyNumber, Access: "m"},
	{Allow: true, Type: "b", Major: anyNumber, Minor: anyNumber, Access: "m"},
	{Allow: true, Type: "c", Major: 1, Minor: 3, Access: "rwm"},           // null
	{Allow: true, Type: "c", Major: 1, Minor: 5, Access: "rwm"},           // zero
	{Allow: true, Type: "c", Major: 1, Minor: 7, Access: "rwm"},           // full
	{Allow: true, Type: "c", Major: 1, Minor: 8, Access: "rwm"},           // random
	{Allow: true, Type: "c", Major: 1, Minor: 9, Access: "rwm"},           // urandom
	{Allow: true, Type: "c", Major: 5, Minor: 0, Access: "rwm"},           // tty
	{Allow: true, Type: "c", Major: 5, Minor: 2, Access: "rwm"},           // ptmx
	{Allow: true, Type: "c", Major: 136, Minor: anyNumber, Access: "rwm"}, // pts
	{Allow: true, Type: "c", Major: 10, Minor: 200, Access: "rwm"},        // tun
	{Allow: false, Type: "c", Major: 5, Minor: 1, Access: "rw"},           // console
}

// deviceRules returns the device rules for a container. The rules in its resources come first, then rules for its
// devices, then defaultDevices. The last rule that matches decides. Access that no rule matches is denied.
func deviceRules(linux *pb.Linux) []*pb.LinuxDeviceCgroup {
	rules := slices.Clone(linux.GetResources().GetDevices())
	for _, d := range linux.GetDevices() {
		kind := d.Type
		if kind == "u" {
			kind = "c"
		}
		if kind == "c" || kind == "b" {
			rules = append(rules, &pb.LinuxDeviceCgroup{Allow: true, Type: kind, Major: d.Major, Minor: d.Minor, Access: "rwm"})
		}
	}
	return append(rules, defaultDevices...)
}

// filterDevices attaches a device filter with the given rules to the cgroup.
func (c *cgroup) filterDevices(rules []*pb.LinuxDeviceCgroup) error {
	if len(rules) > maxDeviceRules {
		return refusal.Invalid("%d device rules are more than %d", len(rules), maxDeviceRules)
	}
	program, err := loadDeviceProgram(deviceProgram(rules))
	if err != nil {
		return fmt.Errorf("load device filter: %w", err)
	}
	defer program.Close()
	attr := struct{ target, program, kind, flags uint32 }{
		target: uint32(c.dir.Fd()), program: uint32(program.Fd()), kind: unix.BPF_CGROUP_DEVICE,
	}
	if _, err := bpf(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); err != nil {
		return fmt.Errorf("attach device filter: %w", err)
	}
	return nil
}

// instruction is struct bpf_insn of <linux/bpf.h>.
type instruction struct {
	op       uint8
	dst, src uint8 // 4 bits each, which share a byte in the kernel's struct
	off      int16
	imm      int32
}

// Registers of a device program.
const (
	regResult = iota
	regArguments
	regKind   // BPF_DEVCG_DEV_*
	regAccess // BPF_DEVCG_ACC_*
	regMajor
	regMinor
	regScratch
)

// deviceProgram translates rules to a BPF program that returns 1 to allow an access and 0 to deny it.
func deviceProgram(rules []*pb.LinuxDeviceCgroup) []instruction {
	load := func(dst uint8, off int16) instruction {
		return instruction{op: unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W, dst: dst, src: regArguments, off: off}
	}
	alu := func(op uint8, dst uint8, imm int32) instruction {
		return instruction{op: unix.BPF_ALU | op | unix.BPF_K, dst: dst, imm: imm}
	}
	copyTo := func(dst, src uint8) instruction {
		return instruction{op: unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X, dst: dst, src: src}
	}
	// The argument is a struct bpf_cgroup_dev_ctx. Its first word has the access in the upper half and the type in the
	// lower half.
	program := []instruction{
		load(regKind, 0), copyTo(regAccess, regKind), alu(unix.BPF_RSH, regAccess, 16), alu(unix.BPF_AND, regKind, 0xffff),
		load(regMajor, 4), load(regMinor, 8),
	}
	returnResult := func(allow bool) []instruction {
		value := int32(0)
		if allow {
			value = 1
		}
		return []instruction{alu(unix.BPF_MOV, regResult, value), {op: unix.BPF_JMP | unix.BPF_EXIT}}
	}
	for i := len(rules) - 1; i >= 0; i-- { // the last rule that matches decides
		r := rules[i]
		var test []instruction // jumps to the next rule if this one does not match; the offsets are set below
		skipIf := func(reg uint8, jump uint8, imm int32) {
			test = append(test, instruction{op: unix.BPF_JMP | jump | unix.BPF_K, dst: reg, imm: imm})
		}
		switch r.GetType() {
		case "b":
			skipIf(regKind, unix.BPF_JNE, unix.BPF_DEVCG_DEV_BLOCK)
		case "c", "u":
			skipIf(regKind, unix.BPF_JNE, unix.BPF_DEVCG_DEV_CHAR)
		}
		if mask := accessMask(r.GetAccess()); mask != allAccess {
			test = append(test, copyTo(regScratch, regAccess))
			if r.Allow { // matches if the rule allows every requested access
				test = append(test, alu(unix.BPF_AND, regScratch, allAccess&^mask))
				skipIf(regScratch, unix.BPF_JNE, 0)
			} else { // matches if the rule denies any requested access
				test = append(test, alu(unix.BPF_AND, regScratch, mask))
				skipIf(regScratch, unix.BPF_JEQ, 0)
			}
		}
		if r.GetType() != "a" && r.GetType() != "" {
			if r.Major >= 0 {
				skipIf(regMajor, unix.BPF_JNE, int32(r.Major))
			}
			if r.Minor >= 0 {
				skipIf(regMinor, unix.BPF_JNE, int32(r.Minor))
			}
		}
		body := append(test, returnResult(r.GetAllow())...)
		if len(test) == 0 {
			return append(program, body...) // the kernel rejects programs with unreachable code
		}
		for n := range test {
			if test[n].op&7 == unix.BPF_JMP {
				body[n].off = int16(len(body) - n - 1)
			}
		}
		program = append(program, body...)
	}
	return append(program, returnResult(false)...)
}

const allAccess = unix.BPF_DEVCG_ACC_MKNOD | unix.BPF_DEVCG_ACC_READ | unix.BPF_DEVCG_ACC_WRITE

// accessMask parses a rule's access, which consists of the letters r, w and m. No letters mean all access.
func accessMask(letters string) int32 {
	var mask int32
	for letter, bit := range map[string]int32{
		"m": unix.BPF_DEVCG_ACC_MKNOD, "r": unix.BPF_DEVCG_ACC_READ, "w": unix.BPF_DEVCG_ACC_WRITE,
	} {
		if strings.Contains(letters, letter) {
			mask |= bit
		}
	}
	if mask == 0 {
		return allAccess
	}
	return mask
}

// loadDeviceProgram loads a device filter into the kernel.
func loadDeviceProgram(program []instruction) (*os.File, error) {
	code := make([]byte, 0, 8*len(program))
	for _, i := range program {
		code = append(code, i.op, i.src<<4|i.dst, byte(i.off), byte(i.off>>8),
			byte(i.imm), byte(i.imm>>8), byte(i.imm>>16), byte(i.imm>>24))
	}
	license := [...]byte{0} // the program calls no function that requires a license
	attr := struct {
		kind, count   uint32
		code, license unsafe.Pointer
		log           [3]uint64 // log level and size, log buffer, kernel version and flags; all unused
	}{unix.BPF_PROG_TYPE_CGROUP_DEVICE, uint32(len(program)), unsafe.Pointer(&code[0]), unsafe.Pointer(&license), [3]uint64{}}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "device filter"), nil
}

// bpf calls bpf(2).
func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
		if errno == unix.EAGAIN {
			continue // a signal, such as SIGCHLD, interrupted the kernel's verification of the program
		}
		if errno != 0 {
			return -1, errno
		}
		return int(fd), nil
	}
}
