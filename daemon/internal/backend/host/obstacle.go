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

// An obstacle is what keeps a device of this host from being used.
type obstacle struct {
	what        string // is wrong
	fix         string // in short: a command where there is one
	fixDetail   string // continues the sentence of fix
	fixableHere bool   // on this machine, without its provider

	denied bool // to this user: nothing is known of what root would find
}

func (o *obstacle) Error() string { return o.what + ": " + o.fix }

// advice is the complete fix.
func (o *obstacle) advice() string { return o.fix + o.fixDetail }

// deviceObstacle explains why a device of /dev could not be opened. module is the kernel's for it.
func (m machine) deviceObstacle(device, module string, err error) *obstacle {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return m.absentObstacle(device, module)
	case errors.Is(err, unix.EACCES):
		return m.permissionObstacle(device)
	case errors.Is(err, unix.EPERM):
		return &obstacle{what: "the device policy of this container forbids " + device, fix: passDevice(device), fixableHere: true}
	}
	return &obstacle{what: err.Error(), fix: "load its module again: modprobe -r " + module + " && modprobe " + module, fixableHere: true}
}

func (m machine) absentObstacle(device, module string) *obstacle {
	name := filepath.Base(device)
	what := "there is no " + device
	number := strings.TrimSpace(m.read("/sys/class/misc/" + name + "/dev")) // the kernel's, of a device that it has
	switch {
	case m.inContainer() && number != "":
		return &obstacle{what: what + " in this container", fix: passDevice(device), fixableHere: true}
	case m.inContainer():
		return &obstacle{what: what + " in this container, nor on its host", fix: "on the host: modprobe " + module, fixDetail: ", then " + passDevice(device), fixableHere: true}
	case number != "":
		return &obstacle{what: what + ", though the kernel has it",
			fix: fmt.Sprintf("mknod -m 600 %s c %s", device, strings.Replace(number, ":", " ", 1)), fixableHere: true}
	case !m.hasModule(module):
		return &obstacle{what: what, fix: fmt.Sprintf("boot the distribution's standard kernel: this one, %s, has no module %s", m.kernel(), module),
			fixDetail: " (on Debian: apt install linux-image-amd64)", fixableHere: true}
	case m.exists("/sys/module/" + module):
		return &obstacle{what: fmt.Sprintf("%s, though its module %s is loaded", what, module), fix: firmware}
	}
	return &obstacle{what: what, fix: "modprobe " + module,
		fixDetail: ", and for each boot: echo " + module + " >>/etc/modules-load.d/msbd.conf", fixableHere: true}
}

const firmware = "turn on virtualisation (Intel: VT-x; AMD: SVM) in the firmware's setup"

func passDevice(device string) string { return "start the container with --device " + device }

// permissionObstacle is about a user who is not root: root needs no permission.
func (m machine) permissionObstacle(device string) *obstacle {
	l := &obstacle{what: "this user may not open " + device, fix: "run as root", fixableHere: true, denied: true}
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
	l.fix, l.fixDetail = "usermod -aG "+group+" "+name, ", then log in again"
	return l
}
