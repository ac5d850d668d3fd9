package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"

	"github.com/pierrec/lz4/v4"
)

// bootModules are the kernel modules that every guest loads. Their dependencies are added by loadOrder.
var bootModules = []string{
	"virtio_pci", "virtio_console", "virtiofs", "virtio_net", "virtio_rng", "virtio_balloon",
	"virtio_blk", "erofs", "overlay", "vmw_vsock_virtio_transport",
}

// module is a kernel module.
type module struct {
	name string // the kernel's name of the module, with underscores
	data []byte
}

// kernelPackage holds the files of a Debian kernel package that this tool uses.
type kernelPackage struct {
	path    string
	vmlinuz []byte
	modules map[string][]byte
}

func openKernelPackage(deb string) (*kernelPackage, error) {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", deb, err)
	}
	pkg, readErr := readKernelPackage(deb, stdout)
	// Read the rest, so that dpkg-deb does not block if readKernelPackage returned early.
	_, _ = io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("unpack %s: %w: %s", deb, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return pkg, readErr
}

func readKernelPackage(deb string, r io.Reader) (*kernelPackage, error) {
	pkg := &kernelPackage{path: deb, modules: make(map[string][]byte)}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("unpack %s: %w", deb, err)
		}
		name := path.Clean(h.Name)
		kernel, _ := path.Match("boot/vmlinuz-*", name)
		if !kernel && path.Ext(name) != ".ko" {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			return nil, fmt.Errorf("unpack %s: %s: %w", deb, name, err)
		}
		if kernel {
			pkg.vmlinuz = data
		} else {
			pkg.modules[moduleName(name)] = data
		}
	}
	if pkg.vmlinuz == nil {
		return nil, fmt.Errorf("%s has no kernel; use the package that linux-image-cloud-amd64 depends on", deb)
	}
	return pkg, nil
}

// moduleName returns the name that the kernel and other modules use for the module in a file.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}

// loadOrder returns the wanted modules and their dependencies. Each module comes after those that it depends on.
func (p *kernelPackage) loadOrder(wanted []string) ([]module, error) {
	var order []module
	seen := make(map[string]bool)
	var add func(name string) error
	add = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		data, ok := p.modules[name]
		if !ok {
			return fmt.Errorf("%s has no module %s", p.path, name)
		}
		needs, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("read module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, module{name, data})
		return nil
	}
	for _, name := range wanted {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleDepends returns the modules in the "depends=" entry of a module's .modinfo section.
func moduleDepends(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

// extractKernel returns the ELF kernel inside a bzImage (Documentation/arch/x86/boot.rst). QEMU starts it directly
// through its PVH entry point. Debian compresses it as a legacy LZ4 frame.
func extractKernel(bzImage []byte) ([]byte, error) {
	const headerEnd = 0x250
	if len(bzImage) < headerEnd || string(bzImage[0x202:0x206]) != "HdrS" {
		return nil, errors.New("not a bzImage")
	}
	setupSectors := int(bzImage[0x1f1])
	offset := int(binary.LittleEndian.Uint32(bzImage[0x248:]))
	length := int(binary.LittleEndian.Uint32(bzImage[0x24c:]))
	start := (setupSectors+1)*512 + offset
	// The payload ends with the kernel's size, 4 bytes that are not part of the frame.
	end := start + length - 4
	if start < 0 || end > len(bzImage) || start >= end {
		return nil, errors.New("the payload is outside of the file")
	}
	vmlinux, err := io.ReadAll(lz4.NewReader(bytes.NewReader(bzImage[start:end])))
	if err != nil {
		return nil, fmt.Errorf("decompress: %w", err)
	}
	if size := int(binary.LittleEndian.Uint32(bzImage[end:])); len(vmlinux) != size {
		return nil, fmt.Errorf("the decompressed kernel has %d bytes, want %d", len(vmlinux), size)
	}
	if !bytes.HasPrefix(vmlinux, []byte(elf.ELFMAG)) {
		return nil, errors.New("the payload is not an ELF file")
	}
	return vmlinux, nil
}
