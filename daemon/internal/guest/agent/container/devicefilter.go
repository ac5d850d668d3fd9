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

// anyNumber matches each major or minor number.
const anyNumber = -1

// maxDeviceRules bounds a filter: the kernel takes a million instructions, an honest spec needs some
// hundred.
const maxDeviceRules = 1024

// defaultDevices is what every container may use, as with every runtime: make any node, and open the
// harmless ones and terminals.
var defaultDevices = []*pb.LinuxDeviceCgroup{
	{Allow: true, Type: "c", Major: anyNumber, Minor: anyNumber, Access: "m"},
	{Allow: true, Type: "b", Major: anyNumber, Minor: anyNumber, Access: "m"},
	{Allow: true, Type: "c", Major: 1, Minor: 3, Access: "rwm"},           // null
	{Allow: true, Type: "c", Major: 1, Minor: 5, Access: "rwm"},           // zero
	{Allow: true, Type: "c", Major: 1, Minor: 7, Access: "rwm"},           // full
	{Allow: true, Type: "c", Major: 1, Minor: 8, Access: "rwm"},           // random
	{Allow: true, Type: "c", Major: 1, Minor: 9, Access: "rwm"},           // urandom
	{Allow: true, Type: "c", Major: 5, Minor: 0, Access: "rwm"},           // tty
	{Allow: true, Type: "c", Major: 5, Minor: 1, Access: "rwm"},           // console
	{Allow: true, Type: "c", Major: 5, Minor: 2, Access: "rwm"},           // ptmx
	{Allow: true, Type: "c", Major: 136, Minor: anyNumber, Access: "rwm"}, // pts
	{Allow: true, Type: "c", Major: 10, Minor: 200, Access: "rwm"},        // tun
}

// deviceRules returns what a container may do with devices: what its resources say, its own devices,
// and the default, the last rule that matches being the one that counts. Nothing else is allowed.
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

// filterDevices makes the kernel hold the group's processes to rules.
func (c *cgroup) filterDevices(rules []*pb.LinuxDeviceCgroup) error {
	if len(rules) > maxDeviceRules {
		return refusal.Invalid("%d device rules", len(rules))
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
	dst, src uint8 // 4 bits each, in one byte of the kernel's
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

// deviceProgram translates rules to a program that returns 1 for what is allowed and 0 for the rest.
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
	// struct bpf_cgroup_dev_ctx: access in the upper half of the first word and type in the lower.
	program := []instruction{
		load(regKind, 0), copyTo(regAccess, regKind), alu(unix.BPF_RSH, regAccess, 16), alu(unix.BPF_AND, regKind, 0xffff),
		load(regMajor, 4), load(regMinor, 8),
	}
	answer := func(allow bool) []instruction {
		value := int32(0)
		if allow {
			value = 1
		}
		return []instruction{alu(unix.BPF_MOV, regResult, value), {op: unix.BPF_JMP | unix.BPF_EXIT}}
	}
	for i := len(rules) - 1; i >= 0; i-- { // the last one counts
		r := rules[i]
		var test []instruction // jumps out where the rule does not match; the targets follow
		unless := func(reg uint8, jump uint8, imm int32) {
			test = append(test, instruction{op: unix.BPF_JMP | jump | unix.BPF_K, dst: reg, imm: imm})
		}
		switch r.GetType() {
		case "b":
			unless(regKind, unix.BPF_JNE, unix.BPF_DEVCG_DEV_BLOCK)
		case "c", "u":
			unless(regKind, unix.BPF_JNE, unix.BPF_DEVCG_DEV_CHAR)
		}
		if mask := accessMask(r.GetAccess()); mask != allAccess {
			test = append(test, copyTo(regScratch, regAccess))
			if r.Allow { // all that is asked for
				test = append(test, alu(unix.BPF_AND, regScratch, allAccess&^mask))
				unless(regScratch, unix.BPF_JNE, 0)
			} else { // any of it
				test = append(test, alu(unix.BPF_AND, regScratch, mask))
				unless(regScratch, unix.BPF_JEQ, 0)
			}
		}
		if r.GetType() != "a" && r.GetType() != "" {
			if r.Major >= 0 {
				unless(regMajor, unix.BPF_JNE, int32(r.Major))
			}
			if r.Minor >= 0 {
				unless(regMinor, unix.BPF_JNE, int32(r.Minor))
			}
		}
		body := append(test, answer(r.GetAllow())...)
		if len(test) == 0 {
			return append(program, body...) // the kernel takes no code that is never reached
		}
		for n := range test {
			if test[n].op&7 == unix.BPF_JMP {
				body[n].off = int16(len(body) - n - 1)
			}
		}
		program = append(program, body...)
	}
	return append(program, answer(false)...)
}

const allAccess = unix.BPF_DEVCG_ACC_MKNOD | unix.BPF_DEVCG_ACC_READ | unix.BPF_DEVCG_ACC_WRITE

// accessMask reads a rule's access, of the letters r, w and m. None means all.
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

func loadDeviceProgram(program []instruction) (*os.File, error) {
	code := make([]byte, 0, 8*len(program))
	for _, i := range program {
		code = append(code, i.op, i.src<<4|i.dst, byte(i.off), byte(i.off>>8),
			byte(i.imm), byte(i.imm>>8), byte(i.imm>>16), byte(i.imm>>24))
	}
	license := [...]byte{0} // of no functions that ask for one
	attr := struct {
		kind, count   uint32
		code, license unsafe.Pointer
		log           [3]uint64 // level and size, buffer, kernel version and flags: none
	}{unix.BPF_PROG_TYPE_CGROUP_DEVICE, uint32(len(program)), unsafe.Pointer(&code[0]), unsafe.Pointer(&license), [3]uint64{}}
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "device filter"), nil
}

func bpf(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
		if errno == unix.EAGAIN {
			continue // a signal came, such as of a child's end, while the kernel looked at the program
		}
		if errno != 0 {
			return -1, errno
		}
		return int(fd), nil
	}
}
