package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"
)

// fakeModule returns an ELF file that has only a .modinfo section.
func fakeModule(t *testing.T, info string) []byte {
	t.Helper()
	names := "\x00.modinfo\x00.shstrtab\x00"
	header := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS], header.Ident[elf.EI_DATA], header.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	header.Shoff = 64 + uint64(len(info)+len(names))
	var b bytes.Buffer
	for _, part := range []any{
		header, []byte(info), []byte(names), elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: 64, Size: uint64(len(info))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: 64 + uint64(len(info)), Size: uint64(len(names))},
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func TestLoadOrder(t *testing.T) {
	pkg := &kernelPackage{path: "test.deb", modules: map[string][]byte{
		"net":       fakeModule(t, "license=GPL\x00depends=ring,fail-over\x00"),
		"fail_over": fakeModule(t, "depends=ring\x00"),
		"ring":      fakeModule(t, "depends=\x00"),
		"other":     fakeModule(t, "license=GPL\x00"),
		"broken":    fakeModule(t, "depends=absent\x00"),
	}}
	order, err := pkg.loadOrder([]string{"net", "other", "ring"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range order {
		names = append(names, m.name)
	}
	if want := []string{"ring", "fail_over", "net", "other"}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
	if _, err := pkg.loadOrder([]string{"broken"}); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("module with a missing dependency: %v", err)
	}
}

// fakeKernel returns a bzImage that contains image as Debian's does.
func fakeKernel(t *testing.T, image []byte) []byte {
	t.Helper()
	var payload bytes.Buffer
	w := lz4.NewWriter(&payload)
	if err := w.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(image); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	_ = binary.Write(&payload, binary.LittleEndian, uint32(len(image)))
	const setupSectors, offset = 3, 100
	b := make([]byte, (setupSectors+1)*512+offset)
	b[0x1f1] = setupSectors
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(b[0x248:], offset)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(payload.Len()))
	return append(append(b, payload.Bytes()...), "trailer"...)
}

func TestExtractKernel(t *testing.T) {
	image := append([]byte(elf.ELFMAG), bytes.Repeat([]byte("kernel "), 2<<20)...) // more than one block
	packed := fakeKernel(t, image)
	got, err := extractKernel(packed)
	if err != nil || !bytes.Equal(got, image) {
		t.Errorf("got %d bytes, want %d, with the same content; %v", len(got), len(image), err)
	}
	for name, bad := range map[string][]byte{
		"empty":         nil,
		"not a bzImage": make([]byte, 4096),
		"truncated":     packed[:len(packed)/2],
		"not an ELF":    fakeKernel(t, []byte("text")),
	} {
		if _, err := extractKernel(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestBuildInitrd(t *testing.T) {
	dir := t.TempDir()
	static := buildProgram(t, dir, "CGO_ENABLED=0")
	modules := []module{{"b", []byte("module b")}, {"a", []byte("module a")}}
	first, err := buildInitrd(static, modules)
	if err != nil {
		t.Fatal(err)
	}
	second, err := buildInitrd(static, modules)
	if err != nil || !bytes.Equal(first, second) {
		t.Errorf("the same input gave different bytes, %v", err)
	}
	program, err := os.ReadFile(static)
	if err != nil {
		t.Fatal(err)
	}
	got := readArchive(t, first)
	for name, want := range map[string]entry{
		"init":             {mode: 0o100755, data: string(program)},
		"msb-portal":       {mode: 0o120777, data: "init"},
		"dev/null":         {mode: 0o020666, device: "1:3"},
		"dev/console":      {mode: 0o020600, device: "5:1"},
		"newroot":          {mode: 0o040755},
		"lib/modules/load": {mode: 0o100644, data: "/lib/modules/b.ko\n/lib/modules/a.ko\n"},
		"lib/modules/a.ko": {mode: 0o100644, data: "module a"},
	} {
		if want.device == "" {
			want.device = "0:0"
		}
		if got[name] != want {
			t.Errorf("%s: mode %o, device %s, %d bytes", name, got[name].mode, got[name].device, len(got[name].data))
		}
	}
}

type entry struct {
	mode         uint64
	device, data string
}

// readArchive reads a newc archive as the kernel does.
func readArchive(t *testing.T, b []byte) map[string]entry {
	t.Helper()
	entries := make(map[string]entry)
	align := func(n uint64) uint64 { return (n + 3) &^ 3 }
	for off := uint64(0); ; {
		header := string(b[off : off+110])
		if header[:6] != "070701" {
			t.Fatalf("no header at offset %d", off)
		}
		field := func(i int) uint64 {
			n, err := strconv.ParseUint(header[6+8*i:14+8*i], 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(b[off+110 : off+110+nameSize-1])
		data := align(off + 110 + nameSize)
		if name == "TRAILER!!!" {
			return entries
		}
		entries[name] = entry{mode, fmt.Sprintf("%d:%d", field(9), field(10)), string(b[data : data+size])}
		off = align(data + size)
	}
}

func TestBuildInitrdRejectsDynamicPrograms(t *testing.T) {
	if _, err := buildInitrd("/bin/sh", nil); err == nil || !strings.Contains(err.Error(), "dynamically linked") {
		t.Errorf("got %v", err)
	}
}

// buildProgram compiles a minimal program and returns its path.
func buildProgram(t *testing.T, dir, env string) string {
	t.Helper()
	source, program := filepath.Join(dir, "main.go"), filepath.Join(dir, "program")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", program, source)
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("%w: %s", err, out))
	}
	return program
}
