package main

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"strings"
)

// File types of a cpio mode, from stat(2).
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeChar = 0o020000
	typeLink = 0o120000
)

// buildInitrd returns the initramfs. It is not compressed, because an emulated processor boots no faster with LZ4 or
// zstd. The agent loads the modules in the given order.
func buildInitrd(agent string, modules []module) ([]byte, error) {
	agentELF, err := readStatic(agent)
	if err != nil {
		return nil, err
	}
	var ar archive
	for _, dir := range []string{"dev", "lib", "lib/modules", "newroot", "proc", "run", "sys", "tmp"} {
		ar.add(dir, typeDir|0o755, nil)
	}
	// Before devtmpfs is mounted, the kernel opens the console for init, and Go's runtime opens /dev/null.
	ar.addDevice("dev/console", 0o600, 5, 1)
	ar.addDevice("dev/null", 0o666, 1, 3)
	ar.add("init", typeFile|0o755, agentELF)
	ar.add("msb-portal", typeLink|0o777, []byte("init"))
	ar.addModules(modules)
	return ar.finish(), nil
}

// addModules adds the modules, and lib/modules/load, from which the agent reads their paths, one per line.
func (a *archive) addModules(modules []module) {
	var list strings.Builder
	for _, m := range modules {
		file := "lib/modules/" + m.name + ".ko"
		a.add(file, typeFile|0o644, m.data)
		list.WriteString("/" + file + "\n")
	}
	a.add("lib/modules/load", typeFile|0o644, []byte(list.String()))
}

// readStatic reads a binary for the guest. It returns an error if the binary is dynamically linked, because the guest
// has no dynamic loader.
func readStatic(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is dynamically linked; build it with CGO_ENABLED=0", path)
		}
	}
	return data, nil
}

// archive is a cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	buf   bytes.Buffer
	inode uint32
}

func (a *archive) add(name string, mode uint32, data []byte) { a.entry(name, mode, 0, 0, data) }

func (a *archive) addDevice(name string, perm, major, minor uint32) {
	a.entry(name, typeChar|perm, major, minor, nil)
}

func (a *archive) entry(name string, mode, major, minor uint32, data []byte) {
	a.inode++
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) finish() []byte {
	a.inode = 0
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.buf.Bytes()
}
