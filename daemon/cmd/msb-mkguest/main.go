// Command msb-mkguest builds the uncompressed kernel and the initramfs that every microVM boots.
//
// It extracts the kernel and its modules from a Debian cloud kernel package, adds the guest agent as /init, with the
// link /msb-portal to it, and writes DIR/vmlinux and DIR/initrd.img. The same input gives the same bytes. It is a build
// tool and is not used on a server.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	deb := flag.String("kernel-deb", "", "Debian package linux-image-*-cloud-amd64 (not the metapackage)")
	agent := flag.String("agent", "", "static msb-agent binary")
	out := flag.String("out", "", "directory to write vmlinux and initrd.img to")
	flag.Parse()
	if *deb == "" || *agent == "" || *out == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*deb, *agent, *out); err != nil {
		fmt.Fprintln(os.Stderr, "msb-mkguest:", err)
		os.Exit(1)
	}
}

func run(deb, agent, out string) error {
	pkg, err := openKernelPackage(deb)
	if err != nil {
		return err
	}
	vmlinux, err := extractKernel(pkg.vmlinuz)
	if err != nil {
		return fmt.Errorf("extract the kernel of %s: %w", deb, err)
	}
	modules, err := pkg.loadOrder(bootModules)
	if err != nil {
		return err
	}
	initrd, err := buildInitrd(agent, modules)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(out, "vmlinux"), vmlinux); err != nil {
		return err
	}
	return replaceFile(filepath.Join(out, "initrd.img"), initrd)
}

// replaceFile writes a new file and renames it to path, because running VMs may still map the old file.
func replaceFile(path string, data []byte) error {
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
