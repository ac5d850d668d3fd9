package container

import (
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
)

// TestDeviceProgram interprets device programs as the kernel does.
func TestDeviceProgram(t *testing.T) {
	const r, w, m = unix.BPF_DEVCG_ACC_READ, unix.BPF_DEVCG_ACC_WRITE, unix.BPF_DEVCG_ACC_MKNOD
	const block, char = unix.BPF_DEVCG_DEV_BLOCK, unix.BPF_DEVCG_DEV_CHAR
	standard := deviceProgram(deviceRules(&pb.Linux{
		Devices:   []*pb.LinuxDevice{{Path: "/dev/disk", Type: "b", Major: 254, Minor: 0}, {Path: "/dev/fifo", Type: "p"}},
		Resources: &pb.LinuxResources{Devices: []*pb.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}, {Allow: true, Type: "c", Major: 10, Minor: 229, Access: "r"}}},
	}))
	withConsole := deviceProgram(deviceRules(&pb.Linux{
		Resources: &pb.LinuxResources{Devices: []*pb.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: 5, Minor: 1, Access: "rwm"}}},
	}))
	everything := deviceProgram([]*pb.LinuxDeviceCgroup{
		{Allow: false, Type: "a"}, {Allow: true, Type: "a", Major: anyNumber, Minor: anyNumber, Access: "rwm"},
		{Allow: false, Type: "c", Major: 1, Minor: 1, Access: "w"},
	})
	for _, tt := range []struct {
		name                       string
		program                    []instruction
		access, kind, major, minor uint32
		want                       uint64
	}{
		{"null", standard, r | w, char, 1, 3, 1},
		{"mem", standard, r, char, 1, 1, 0},
		{"mknod of mem", standard, m, char, 1, 1, 1},
		{"mknod and read of mem", standard, m | r, char, 1, 1, 0},
		{"terminal", standard, r | w, char, 136, 77, 1},
		{"the container's disk", standard, r | w, block, 254, 0, 1},
		{"another disk", standard, r, block, 254, 16, 0},
		{"character device with the disk's number", standard, r, char, 254, 0, 0},
		{"access that the spec allows", standard, r, char, 10, 229, 1},
		{"more access than the spec allows", standard, r | w, char, 10, 229, 0},
		{"rules that allow everything", everything, r | w | m, block, 9, 9, 1},
		{"access denied by the last rule", everything, r | w, char, 1, 1, 0},
		{"access not denied by the last rule", everything, r, char, 1, 1, 1},
		{"console", standard, w, char, 5, 1, 0},
		{"mknod of the console", standard, m, char, 5, 1, 1},
		{"console that the spec allows", withConsole, w, char, 5, 1, 0},
		{"no rules", deviceProgram(nil), r, char, 1, 3, 0},
	} {
		if got := interpret(t, tt.program, [3]uint32{tt.access<<16 | tt.kind, tt.major, tt.minor}); got != tt.want {
			t.Errorf("%s: program returned %d, want %d", tt.name, got, tt.want)
		}
	}
}

// interpret runs a program. It supports only the instructions that deviceProgram uses.
func interpret(t *testing.T, program []instruction, context [3]uint32) uint64 {
	t.Helper()
	var reg [10]uint64
	for pc := 0; pc < len(program); pc++ {
		i := program[pc]
		switch i.op {
		case unix.BPF_LDX | unix.BPF_MEM | unix.BPF_W:
			reg[i.dst] = uint64(context[i.off/4])
		case unix.BPF_ALU | unix.BPF_MOV | unix.BPF_X:
			reg[i.dst] = reg[i.src]
		case unix.BPF_ALU | unix.BPF_MOV | unix.BPF_K:
			reg[i.dst] = uint64(i.imm)
		case unix.BPF_ALU | unix.BPF_RSH | unix.BPF_K:
			reg[i.dst] >>= i.imm
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			reg[i.dst] &= uint64(i.imm)
		case unix.BPF_JMP | unix.BPF_JNE | unix.BPF_K:
			if reg[i.dst] != uint64(i.imm) {
				pc += int(i.off)
			}
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			if reg[i.dst] == uint64(i.imm) {
				pc += int(i.off)
			}
		case unix.BPF_JMP | unix.BPF_EXIT:
			return reg[regResult]
		default:
			t.Fatalf("unknown instruction %#x", i.op)
		}
	}
	t.Fatal("program ran past its end")
	return 0
}
