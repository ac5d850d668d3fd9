package hypervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/socketfilter"
	"github.com/msbd/msbd/daemon/internal/sys/thread"
)

// A guest that has taken over its QEMU must not get further. So QEMU runs in a jail: as a user of its own, without
// capabilities, in the cgroup of its sandbox, and in new namespaces, with no network interface but loopback, and no
// files. It has only the descriptors that it gets: those of its sockets, its logs, its disks and its guest's kernel.
//
// This program, executed again, builds the jail and then executes QEMU. Until QEMU has started, it needs its libraries
// and firmware. So the root of its mount namespace is an empty file system in memory, in which the host's root is
// mounted at oldRoot, and which has a link to each directory there. Once QEMU runs, emptyJail removes all of this.

const (
	// jailName is os.Args[0] of the child process that builds a jail.
	jailName = "msbd-qemu"
	// oldRoot is where the host's root is mounted in a jail until QEMU has started.
	oldRoot = "/host"
	// jailSource is the source of the mount of a jail's root, by which emptyJail recognizes a jail.
	jailSource = "msb-jail"
)

// A jail describes the jail of a QEMU.
type jail struct {
	// UID is the user and the group of QEMU.
	UID uint32 `json:"uid"`
	// Dir is an empty directory of the host where the root of the jail is mounted, in the jail's mount namespace only.
	Dir string `json:"dir"`
	// Go is the descriptor of a pipe from which the child reads one byte before it executes QEMU. Without it, the child
	// exits.
	Go int `json:"go"`
	// KVM is set if QEMU uses KVM.
	KVM bool `json:"kvm"`
	// MaxFile is the largest size, in bytes, to which QEMU may make a file grow.
	MaxFile uint64 `json:"max_file"`
}

// RunJailIfChild must be called first in main of every program that starts a Service. A Service executes the program
// again, as a child process that becomes QEMU. In that child, RunJailIfChild does not return.
func RunJailIfChild() {
	if os.Args[0] != jailName {
		return
	}
	// The child reports errors where QEMU reports its own.
	fmt.Fprintln(os.Stderr, runJail(os.Args[1], os.Args[2:]))
	unix.Exit(1)
}

// runJail builds the jail that config describes, as JSON, and executes the command in it. It returns only on an error.
func runJail(config string, command []string) error {
	runtime.LockOSThread() // some attributes are those of a thread, and the thread that executes QEMU keeps its own
	var j jail
	if err := json.Unmarshal([]byte(config), &j); err != nil {
		return err
	}
	if err := j.build(); err != nil {
		return fmt.Errorf("build the jail of QEMU: %w", err)
	}
	start := os.NewFile(uintptr(j.Go), "go")
	if _, err := io.ReadFull(start, make([]byte, 1)); err != nil {
		return errors.New("msbd has ended before QEMU started")
	}
	start.Close()
	if err := closeFrom(j.Go); err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	if err := unix.Exec(command[0], command, os.Environ()); err != nil {
		return fmt.Errorf("execute %s as user %d: %w", command[0], j.UID, err)
	}
	return nil
}

// closeFrom makes the descriptors from first on close when this process executes QEMU: it gets none that msbd itself was
// started with.
func closeFrom(first int) error {
	fds, err := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		if n, err := strconv.Atoi(fd.Name()); err == nil && n >= first {
			unix.CloseOnExec(n)
		}
	}
	return err
}

// build makes this process, which is in new namespaces, a member of the jail.
func (j jail) build() error {
	unix.Umask(0o022) // QEMU must reach its program, whatever the umask of msbd
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount(jailSource, j.Dir, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "size=64k,mode=755"); err != nil {
		return fmt.Errorf("mount its root: %w", err)
	}
	if err := os.Mkdir(filepath.Join(j.Dir, oldRoot), 0o755); err != nil {
		return err
	}
	if err := unix.PivotRoot(j.Dir, filepath.Join(j.Dir, oldRoot)); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	entries, err := os.ReadDir(oldRoot)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "dev" {
			continue
		}
		if err := os.Symlink(filepath.Join(oldRoot, e.Name()), "/"+e.Name()); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := j.makeDevices(); err != nil {
		return fmt.Errorf("create its devices: %w", err)
	}
	return j.dropPrivileges()
}

// makeDevices creates the devices that QEMU opens.
func (j jail) makeDevices() error {
	if err := os.Mkdir("/dev", 0o755); err != nil {
		return err
	}
	names := []string{"null", "urandom"}
	if j.KVM {
		names = append(names, "kvm")
	}
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(oldRoot, "dev", name), &st); err != nil {
			return fmt.Errorf("find /dev/%s: %w", name, err)
		}
		path := filepath.Join("/dev", name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(st.Rdev)); err != nil {
			return fmt.Errorf("create %s: %w", path, err)
		}
		if err := os.Chown(path, int(j.UID), int(j.UID)); err != nil {
			return err
		}
	}
	return nil
}

// dropPrivileges makes this process, and what it executes, one of the jail's user without capabilities.
func (j jail) dropPrivileges() error {
	for resource, limit := range map[int]uint64{
		unix.RLIMIT_CORE:  0, // a core file would have the guest's memory
		unix.RLIMIT_FSIZE: j.MaxFile,
	} {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
			return fmt.Errorf("set limit %d: %w", resource, err)
		}
	}
	for c := uintptr(0); ; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel knows no more capabilities
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Setgroups(nil); err != nil {
		return fmt.Errorf("leave all groups: %w", err)
	}
	id := int(j.UID)
	if err := unix.Setresgid(id, id, id); err != nil {
		return fmt.Errorf("set the group; if the id is not usable on this host, set qemu-users: %w", err)
	}
	if err := unix.Setresuid(id, id, id); err != nil {
		return fmt.Errorf("set the user; if the id is not usable on this host, set qemu-users: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return socketfilter.Apply()
}

// start starts command in the jail, in its own session. The process executes command once the caller has written a byte
// to gate, and exits if the caller closes gate without that. output is where it writes its messages. files are the
// descriptors that it gets, from 3 on.
func (j jail) start(command []string, env []string, output *os.File, files []*os.File) (child *os.Process, gate *os.File, err error) {
	if os.Args[0] == jailName {
		panic("hypervisor: main does not call RunJailIfChild first") // without this, each child would start another
	}
	in, gate, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer in.Close()
	const firstFD = 3
	j.Go = firstFD + len(files)
	config, _ := json.Marshal(j) // cannot fail: it has only strings and numbers
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append([]string{jailName, string(config)}, command...)
	cmd.Env, cmd.Dir = env, "/"
	cmd.ExtraFiles = append(files[:len(files):len(files)], in)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	if err := process.WithoutOOMProtection(cmd.Start); err != nil {
		gate.Close()
		return nil, nil, fmt.Errorf("start %s: %w", filepath.Base(command[0]), err)
	}
	return cmd.Process, gate, nil
}

// emptyJail removes all files from the jail of qemu, which has started. It may be called again. It returns an error if
// qemu has exited or has no jail.
func emptyJail(qemu *process.Process) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", qemu.PID))
	if err != nil {
		return fmt.Errorf("empty the jail of QEMU: %w", err)
	}
	defer ns.Close()
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", qemu.PID))
	switch {
	case err != nil:
	case qemu.Dead(): // then another process may have its pid
		err = errors.New("it has exited")
	case !slices.ContainsFunc(strings.Split(string(mounts), "\n"), isJailRoot):
		err = errors.New("it has none") // never remove files elsewhere
	default:
		err = inMountNamespace(ns, removeRoot)
	}
	if err != nil {
		return fmt.Errorf("empty the jail of QEMU: %w", err)
	}
	return nil
}

// isJailRoot reports whether line, a line of mountinfo, describes the root of a jail.
func isJailRoot(line string) bool {
	mount, source, _ := strings.Cut(line, " - ")
	fields, sources := strings.Fields(mount), strings.Fields(source)
	return len(fields) > 4 && fields[4] == "/" && len(sources) > 1 && sources[1] == jailSource
}

// inMountNamespace runs f on a thread that has entered the mount namespace ns.
func inMountNamespace(ns *os.File, f func() error) error {
	return thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return err
		}
		return f()
	})
}

// removeRoot removes everything from the root of the jail that this thread has entered. It leaves no files if it is
// interrupted and called again.
func removeRoot() error {
	for dir, wanted := range map[string]func(path string) bool{
		"/dev": func(string) bool { return true },
		"/": func(path string) bool {
			target, _ := os.Readlink(path)
			return strings.HasPrefix(target, oldRoot+"/")
		},
	} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if path := filepath.Join(dir, e.Name()); wanted(path) {
				if err := os.Remove(path); err != nil {
					return err
				}
			}
		}
	}
	if err := unix.Unmount(oldRoot, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount the host's root: %w", err)
	}
	for _, dir := range []string{"/dev", oldRoot} {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
