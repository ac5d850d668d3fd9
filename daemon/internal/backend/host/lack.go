package host

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A lack is what keeps a device of this host from being used.
type lack struct {
	what string // is missing
	mend string // what mends it, in short: a command where there is one
	more string // of that, in the same sentence
	here bool   // it can be mended on this machine, without its provider

	denied bool // to this user: what root would find cannot be told
}

func (l *lack) Error() string { return l.what + ": " + l.mend }

// advice is what to do, whole.
func (l *lack) advice() string { return l.mend + l.more }

// deviceLack explains why a device of /dev could not be opened. module is the kernel's for it.
func (m machine) deviceLack(device, module string, err error) *lack {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return m.absentLack(device, module)
	case errors.Is(err, unix.EACCES):
		return m.permissionLack(device)
	case errors.Is(err, unix.EPERM):
		return &lack{what: "the device policy of this container forbids " + device, mend: passDevice(device), here: true}
	}
	return &lack{what: err.Error(), mend: "load its module again: modprobe -r " + module + " && modprobe " + module, here: true}
}

func (m machine) absentLack(device, module string) *lack {
	name := filepath.Base(device)
	what := "there is no " + device
	number := strings.TrimSpace(m.read("/sys/class/misc/" + name + "/dev")) // the kernel's, of a device that it has
	switch {
	case m.inContainer() && number != "":
		return &lack{what: what + " in this container", mend: passDevice(device), here: true}
	case m.inContainer():
		return &lack{what: what + " in this container, nor on its host", mend: "on the host: modprobe " + module, more: ", then " + passDevice(device), here: true}
	case number != "":
		return &lack{what: what + ", though the kernel has it",
			mend: fmt.Sprintf("mknod -m 600 %s c %s", device, strings.Replace(number, ":", " ", 1)), here: true}
	case !m.hasModule(module):
		return &lack{what: what, mend: fmt.Sprintf("boot the distribution's standard kernel: this one, %s, has no module %s", m.kernel(), module),
			more: " (on Debian: apt install linux-image-amd64)", here: true}
	case m.exists("/sys/module/" + module):
		return &lack{what: fmt.Sprintf("%s, though its module %s is loaded", what, module), mend: firmware}
	}
	return &lack{what: what, mend: "modprobe " + module,
		more: ", and for each boot: echo " + module + " >>/etc/modules-load.d/msbd.conf", here: true}
}

const firmware = "turn on virtualisation (Intel: VT-x; AMD: SVM) in the firmware's setup"

func passDevice(device string) string { return "start the container with --device " + device }

// permissionLack is about a user who is not root: root needs no permission.
func (m machine) permissionLack(device string) *lack {
	l := &lack{what: "this user may not open " + device, mend: "run as root", here: true, denied: true}
	info, err := os.Stat(m.root + device)
	if err != nil {
		return l
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Gid == 0 || info.Mode().Perm()&0o060 != 0o060 {
		return l
	}
	group, name := strconv.Itoa(int(owner.Gid)), strconv.Itoa(os.Geteuid())
	if g, err := user.LookupGroupId(group); err == nil {
		group = g.Name
	}
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	l.mend, l.more = "usermod -aG "+group+" "+name, ", then log in again"
	return l
}
