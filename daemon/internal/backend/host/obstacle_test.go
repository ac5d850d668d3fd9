package host

import (
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const inDocker = "-> pid:[4026532281]"

// What a host lacks for KVM comes with what mends it there.
func TestKVMObstacle(t *testing.T) {
	for name, tt := range map[string]struct {
		files                map[string]string
		what, fix, fixDetail string
		fixableHere          bool
	}{
		"Intel, module not loaded": {map[string]string{"/proc/cpuinfo": intel},
			"there is no /dev/kvm", "modprobe kvm_intel", "echo kvm_intel >>/etc/modules-load.d/msbd.conf", true},
		"AMD, module not loaded": {map[string]string{"/proc/cpuinfo": amd},
			"there is no /dev/kvm", "modprobe kvm_amd", "echo kvm_amd >>/etc/modules-load.d/msbd.conf", true},
		"kernel without the module": {map[string]string{"/proc/cpuinfo": intel, "/proc/sys/kernel/osrelease": "6.1.0-other"},
			"there is no /dev/kvm", "standard kernel: this one, 6.1.0-other, has no module kvm_intel", "linux-image-amd64", true},
		"module loaded, but the firmware forbids": {map[string]string{"/proc/cpuinfo": amd, "/sys/module/kvm_amd/refcnt": "0"},
			"though its module kvm_amd is loaded", firmware, "", false},
		"no flags": {map[string]string{"/proc/cpuinfo": bare}, "neither vmx nor svm", firmware, "", false},
		"virtual machine without nesting, Intel": {map[string]string{"/proc/cpuinfo": virtual(bare)},
			"neither vmx nor svm", nest, "/sys/module/kvm_intel/parameters/nested", false},
		"virtual machine without nesting, AMD": {map[string]string{"/proc/cpuinfo": virtual(strings.Replace(bare, "GenuineIntel", "AuthenticAMD", 1))},
			"neither vmx nor svm", nest, "/sys/module/kvm_amd/parameters/nested", false},
		"virtual machine with nesting": {map[string]string{"/proc/cpuinfo": virtual(amd)}, "there is no /dev/kvm", "modprobe kvm_amd", "", true},
		"container": {map[string]string{"/proc/cpuinfo": intel, "/proc/self/ns/pid": inDocker, "/sys/class/misc/kvm/dev": "10:232\n"},
			"no /dev/kvm in this container", "--device /dev/kvm", "", true},
		"container on a host without the module": {map[string]string{"/proc/cpuinfo": intel, "/proc/self/ns/pid": inDocker},
			"nor on its host", "on the host: modprobe kvm_intel", "--device /dev/kvm", true},
		"device file missing": {map[string]string{"/proc/cpuinfo": intel, "/sys/class/misc/kvm/dev": "10:232\n"},
			"though the kernel has it", "mknod -m 600 /dev/kvm c 10 232", "", true},
		"no device": {map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "a file"}, "its version", "modprobe -r kvm_intel && modprobe kvm_intel", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, tt.files)
			for _, insist := range []bool{false, true} {
				got := m.kvmObstacle(insist, "", false)
				if got == nil {
					t.Fatal("nothing is lacking")
				}
				if !strings.Contains(got.what, tt.what) || !strings.Contains(got.fix, tt.fix) || !strings.Contains(got.fixDetail, tt.fixDetail) || got.fixableHere != tt.fixableHere {
					t.Errorf("%+v", got)
				}
			}
		})
	}
}

func TestVsockObstacle(t *testing.T) {
	if l := newMachine(t, nil).vsockObstacle(); l == nil || l.Error() != "there is no /dev/vhost-vsock: modprobe vhost_vsock" ||
		!strings.Contains(l.advice(), "echo vhost_vsock >>/etc/modules-load.d/msbd.conf") {
		t.Errorf("module not loaded: %+v", l)
	}
	if l := newMachine(t, map[string]string{"/proc/self/ns/pid": inDocker}).vsockObstacle(); l == nil || !strings.Contains(l.advice(), "--device /dev/vhost-vsock") {
		t.Errorf("container: %+v", l)
	}
	if l := newMachine(t, map[string]string{"/dev/vhost-vsock": ""}).vsockObstacle(); l != nil {
		t.Errorf("there: %v", l)
	}
}

// A user who is not root is sent to the group that may, if there is one.
func TestPermissionObstacle(t *testing.T) {
	m := newMachine(t, map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "", "/dev/vhost-vsock": ""})
	for _, dir := range []string{m.root, filepath.Dir(m.root)} { // the test's own
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kvm, vsock := m.root+"/dev/kvm", m.root+"/dev/vhost-vsock"
	group := strings.TrimSpace(run(t, "id", "-gn"))
	forRoot := os.FileMode(0)
	if os.Geteuid() == 0 {
		group, forRoot = "daemon", 0o060 // nobody shall join the group root
		run(t, "chgrp", group, kvm)
	}
	for path, mode := range map[string]os.FileMode{kvm: 0o060, vsock: forRoot} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	asNobody(func() {
		name := "nobody"
		if u, err := user.Current(); err == nil && os.Getuid() != 0 {
			name = u.Username
		}
		if l := m.kvmObstacle(false, "", false); l == nil || l.fix != "usermod -aG "+group+" "+name || !l.fixableHere {
			t.Errorf("KVM: %+v", l)
		}
		if l := m.vsockObstacle(); l == nil || l.fix != "run as root" {
			t.Errorf("vsock: %+v", l)
		}
	})
}

// asNobody runs f without root's rights, if this test has them.
func asNobody(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread, whose user alone is changed, ends with this goroutine.
		runtime.LockOSThread()
		if os.Geteuid() == 0 {
			keep := ^uintptr(0)
			unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
			unix.RawSyscall(unix.SYS_SETRESGID, keep, 65534, keep)
			unix.RawSyscall(unix.SYS_SETRESUID, keep, 65534, keep)
		}
		f()
	}()
	<-done
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

// This host's own KVM: it is used if the probe says so, or if somebody insists.
func TestRealKVM(t *testing.T) {
	m := newMachine(t, map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "-> /dev/kvm"})
	opens := openKVM("/dev/kvm") == nil
	fast, err := fastKVM("", false, runProbe)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("/dev/kvm opens: %t, is fast: %t", opens, fast)
	if l := m.kvmObstacle(true, "", false); (l == nil) != opens {
		t.Errorf("insisting: %+v", l)
	}
	l := m.kvmObstacle(false, "", false)
	if (l == nil) != fast {
		t.Errorf("%+v", l)
	}
	if opens && !fast && !strings.Contains(l.Error(), "emulated") {
		t.Errorf("%+v", l)
	}
}
