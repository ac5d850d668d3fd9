package host

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	RunProbeIfChild()
	if os.Args[0] == fileLimitChild {
		limit, err := RaiseFileLimit()
		inherited, _ := exec.Command("/bin/sh", "-c", "ulimit -n").Output()
		fmt.Printf("%d %s%v", limit, inherited, err)
		return
	}
	os.Exit(m.Run())
}

// Contents of /proc/cpuinfo.
const (
	intel = "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse\n"
	amd   = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm sse\n"
	bare  = "vendor_id\t: GenuineIntel\nflags\t\t: fpu sse\n" // without virtualization
)

// virtual returns cpuinfo as it is in a virtual machine.
func virtual(cpuinfo string) string { return strings.Replace(cpuinfo, " fpu", " fpu hypervisor", 1) }

// newMachine simulates a host with these files, by path, and with modules for KVM, vsock and taps that are not loaded. The
// content "-> TARGET" makes a symbolic link.
func newMachine(t *testing.T, files map[string]string) machine {
	t.Helper()
	m := machine{root: t.TempDir()}
	all := map[string]string{
		"/proc/self/ns/pid":                          "-> " + hostPIDNamespace,
		"/proc/sys/kernel/osrelease":                 "6.1.0-9-amd64\n",
		"/lib/modules/6.1.0-9-amd64/modules.dep":     "kernel/arch/x86/kvm/kvm-intel.ko.xz: a\nkernel/arch/x86/kvm/kvm-amd.ko.xz: a\nkernel/drivers/vhost/vhost_vsock.ko: a\nkernel/drivers/net/tun.ko: a\n",
		"/lib/modules/6.1.0-9-amd64/modules.builtin": "kernel/fs/overlayfs/overlay.ko\n",
	}
	for path, content := range files {
		all[path] = content
	}
	for path, content := range all {
		path = m.root + path
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return m
}
