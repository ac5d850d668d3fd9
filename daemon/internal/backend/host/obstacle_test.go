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

// An obstacle to KVM has the fix for this host.
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
			"there is no /dev/kvm", "standard kernel, because the running kernel 6.1.0-other has no module kvm_intel", "linux-image-amd64", true},
		"module loaded, disabled in the firmware": {map[string]string{"/proc/cpuinfo": amd, "/sys/module/kvm_amd/refcnt": "0"},
			"although its module kvm_amd is loaded", enableInFirmware, "", false},
		"no flags": {map[string]string{"/proc/cpuinfo": bare}, "neither vmx nor svm", enableInFirmware, "", false},
		"virtual machine without nesting, Intel": {map[string]string{"/proc/cpuinfo": virtual(bare)},
			"neither vmx nor svm", enableNesting, "/sys/module/kvm_intel/parameters/nested", false},
		"virtual machine without nesting, AMD": {map[string]string{"/proc/cpuinfo": virtual(strings.Replace(bare, "GenuineIntel", "AuthenticAMD", 1))},
			"neither vmx nor svm", enableNesting, "/sys/module/kvm_amd/parameters/nested", false},
		"virtual machine with nesting": {map[string]string{"/proc/cpuinfo": virtual(amd)}, "there is no /dev/kvm", "modprobe kvm_amd", "", true},
		"container": {map[string]string{"/proc/cpuinfo": intel, "/proc/self/ns/pid": inDocker, "/sys/class/misc/kvm/dev": "10:232\n"},
			"no /dev/kvm in this container", "--device /dev/kvm", "", true},
		"container on a host without the module": {map[string]string{"/proc/cpuinfo": intel, "/proc/self/ns/pid": inDocker},
			"or on its host", "on the host: modprobe kvm_intel", "--device /dev/kvm", true},
		"device file missing": {map[string]string{"/proc/cpuinfo": intel, "/sys/class/misc/kvm/dev": "10:232\n"},
			"although the kernel has the device", "mknod -m 600 /dev/kvm c 10 232", "", true},
		"not a device": {map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "a file"}, "its version", "modprobe -r kvm_intel && modprobe kvm_intel", "", true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, tt.files)
			for _, required := range []bool{false, true} {
				got := m.kvmObstacle(required, "", false)
				if got == nil {
					t.Fatal("no obstacle")
				}
				if !strings.Contains(got.what, tt.what) || !strings.Contains(got.fix, tt.fix) || !strings.Contains(got.fixDetail, tt.fixDetail) || got.fixableHere != tt.fixableHere {
					t.Errorf("%+v", got)
				}
			}
		})
	}
}

func TestVsockObstacle(t *testing.T) {
	if obs := newMachine(t, nil).vsockObstacle(); obs == nil || obs.Error() != "there is no /dev/vhost-vsock; to fix it: modprobe vhost_vsock" ||
		!strings.Contains(obs.advice(), "echo vhost_vsock >>/etc/modules-load.d/msbd.conf") {
		t.Errorf("module not loaded: %+v", obs)
	}
	if obs := newMachine(t, map[string]string{"/proc/self/ns/pid": inDocker}).vsockObstacle(); obs == nil || !strings.Contains(obs.advice(), "--device /dev/vhost-vsock") {
		t.Errorf("container: %+v", obs)
	}
	if obs := newMachine(t, map[string]string{"/dev/vhost-vsock": ""}).vsockObstacle(); obs != nil {
		t.Errorf("device exists: %v", obs)
	}
}

// For a user who is not root, the fix is to join the group that may use the device, if there is one.
func TestPermissionObstacle(t *testing.T) {
	m := newMachine(t, map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "", "/dev/vhost-vsock": ""})
	for _, dir := range []string{m.root, filepath.Dir(m.root)} { // so that another user can read the files
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kvm, vsock := m.root+"/dev/kvm", m.root+"/dev/vhost-vsock"
	group := strings.TrimSpace(run(t, "id", "-gn"))
	forRoot := os.FileMode(0)
	if os.Geteuid() == 0 {
		group, forRoot = "daemon", 0o060 // no user is advised to join the group root
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
		if obs := m.kvmObstacle(false, "", false); obs == nil || obs.fix != "usermod -aG "+group+" "+name || !obs.fixableHere {
			t.Errorf("KVM: %+v", obs)
		}
		if obs := m.vsockObstacle(); obs == nil || obs.fix != "run as root" {
			t.Errorf("vsock: %+v", obs)
		}
	})
}

// asNobody runs f as the user nobody if the test runs as root.
func asNobody(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Only this thread changes its user. It is never unlocked, so it ends with this goroutine.
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

// On this host, KVM is usable if it is fast, or if it opens and is required.
func TestRealKVM(t *testing.T) {
	m := newMachine(t, map[string]string{"/proc/cpuinfo": intel, "/dev/kvm": "-> /dev/kvm"})
	opens := checkKVM("/dev/kvm") == nil
	fast, err := fastKVM("", false, runProbe)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("/dev/kvm opens: %t, is fast: %t", opens, fast)
	if obs := m.kvmObstacle(true, "", false); (obs == nil) != opens {
		t.Errorf("required: %+v", obs)
	}
	obs := m.kvmObstacle(false, "", false)
	if (obs == nil) != fast {
		t.Errorf("%+v", obs)
	}
	if opens && !fast && !strings.Contains(obs.Error(), "emulated") {
		t.Errorf("%+v", obs)
	}
}
