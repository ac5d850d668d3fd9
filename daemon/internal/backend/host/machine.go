package host

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A machine reads facts about the host from files below root, which is empty outside tests.
type machine struct{ root string }

// read returns the content of the file at path, or "" if the file cannot be read.
func (m machine) read(path string) string {
	content, _ := os.ReadFile(m.root + path)
	return string(content)
}

func (m machine) exists(path string) bool {
	_, err := os.Stat(m.root + path)
	return err == nil
}

// A processor describes the host's first processor as /proc/cpuinfo does.
type processor struct {
	flag    string // vmx or svm, or empty if the processor does not offer virtualization
	module  string // name of the KVM kernel module for this processor
	virtual bool   // the host is itself a virtual machine
}

var (
	flagsRE  = regexp.MustCompile(`(?m)^flags\s*:(.*)$`)
	vendorRE = regexp.MustCompile(`(?m)^vendor_id\s*: (.*)$`)
)

func (m machine) processor() processor {
	var cpu processor
	info := m.read("/proc/cpuinfo")
	if line := flagsRE.FindStringSubmatch(info); line != nil {
		for _, flag := range strings.Fields(line[1]) {
			switch flag {
			case "vmx", "svm":
				cpu.flag = flag
			case "hypervisor":
				cpu.virtual = true
			}
		}
	}
	vendor := vendorRE.FindStringSubmatch(info)
	switch {
	case cpu.flag == "svm", cpu.flag == "" && vendor != nil && (vendor[1] == "AuthenticAMD" || vendor[1] == "HygonGenuine"):
		cpu.module = "kvm_amd"
	default:
		cpu.module = "kvm_intel"
	}
	return cpu
}

// hostPIDNamespace is the initial PID namespace. The kernel gives it a fixed inode number.
const hostPIDNamespace = "pid:[4026531836]"

// inContainer reports whether this process runs in a container. It compares PID namespaces, which works for every
// container engine.
func (m machine) inContainer() bool {
	namespace, err := os.Readlink(m.root + "/proc/self/ns/pid")
	return err == nil && namespace != hostPIDNamespace
}

func (m machine) kernel() string { return strings.TrimSpace(m.read("/proc/sys/kernel/osrelease")) }

// hasModule reports whether the kernel has the module name. It may be loaded, built in, or in a file that modprobe
// finds.
func (m machine) hasModule(name string) bool {
	if m.exists("/sys/module/" + name) {
		return true
	}
	file := regexp.MustCompile(`(?m)/` + strings.ReplaceAll(name, "_", "[-_]") + `\.ko`)
	dir := filepath.Join("/lib/modules", m.kernel())
	return file.MatchString(m.read(dir+"/modules.dep")) || file.MatchString(m.read(dir+"/modules.builtin"))
}
