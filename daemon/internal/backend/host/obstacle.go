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

// An obstacle is the reason why a device of this host cannot be used, and its fix.
type obstacle struct {
	what        string // what is wrong
	fix         string // short, with a command if there is one
	fixDetail   string // more of the fix; follows fix in the same sentence
	fixableHere bool   // whether the fix is on this machine, without its provider or firmware

	denied bool // this user may not open the device, so its state for root is unknown
}

func (o *obstacle) Error() string { return o.what + "; to fix it: " + o.fix }

// advice returns the complete fix.
func (o *obstacle) advice() string { return o.fix + o.fixDetail }

// deviceObstacle returns the obstacle for a device in /dev that could not be opened with err. module is the name of the
// device's kernel module.
func (m machine) deviceObstacle(device, module string, err error) *obstacle {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return m.absentObstacle(device, module)
	case errors.Is(err, unix.EACCES):
		return m.permissionObstacle(device)
	case errors.Is(err, unix.EPERM):
		return &obstacle{what: "the device policy of this container forbids " + device, fix: passDevice(device), fixableHere: true}
	}
	return &obstacle{what: err.Error(), fix: "reload its module: modprobe -r " + module + " && modprobe " + module, fixableHere: true}
}

// absentObstacle is like deviceObstacle but for a device that does not exist.
func (m machine) absentObstacle(device, module string) *obstacle {
	name := filepath.Base(device)
	what := "there is no " + device
	number := strings.TrimSpace(m.read("/sys/class/misc/" + name + "/dev")) // empty if the kernel does not have the device
	switch {
	case m.inContainer() && number != "":
		return &obstacle{what: what + " in this container", fix: passDevice(device), fixableHere: true}
	case m.inContainer():
		return &obstacle{what: what + " in this container or on its host", fix: "on the host: modprobe " + module, fixDetail: ", then " + passDevice(device), fixableHere: true}
	case number != "":
		return &obstacle{what: what + ", although the kernel has the device",
			fix: fmt.Sprintf("mknod -m 600 %s c %s", device, strings.Replace(number, ":", " ", 1)), fixableHere: true}
	case !m.hasModule(module):
		return &obstacle{what: what, fix: fmt.Sprintf("boot the distribution's standard kernel, because the running kernel %s has no module %s", m.kernel(), module),
			fixDetail: " (on Debian: apt install linux-image-amd64)", fixableHere: true}
	case m.exists("/sys/module/" + module):
		return &obstacle{what: fmt.Sprintf("%s, although its module %s is loaded", what, module), fix: enableInFirmware}
	}
	return &obstacle{what: what, fix: "modprobe " + module,
		fixDetail: ", and to load it at each boot: echo " + module + " >>/etc/modules-load.d/msbd.conf", fixableHere: true}
}

const enableInFirmware = "enable virtualization (Intel: VT-x, AMD: SVM) in the firmware setup"

func passDevice(device string) string { return "start the container with --device " + device }

// permissionObstacle returns the obstacle for a device that this user, who is not root, may not open. If a group may
// use the device, the fix is to join it.
func (m machine) permissionObstacle(device string) *obstacle {
	obs := &obstacle{what: "this user may not open " + device, fix: "run as root", fixableHere: true, denied: true}
	info, err := os.Stat(m.root + device)
	if err != nil {
		return obs
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || owner.Gid == 0 || info.Mode().Perm()&0o060 != 0o060 {
		return obs
	}
	group, name := strconv.Itoa(int(owner.Gid)), strconv.Itoa(os.Geteuid())
	if g, err := user.LookupGroupId(group); err == nil {
		group = g.Name
	}
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	obs.fix, obs.fixDetail = "usermod -aG "+group+" "+name, ", then log in again"
	return obs
}
