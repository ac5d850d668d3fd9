package container

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/socketfilter"
	"github.com/msbd/msbd/daemon/internal/sys/timerslack"
)

// This file has the code of the child. The child is this binary, which the agent runs again in the container's
// namespaces. It prepares its process and then execs the user's program. It stays on one locked thread, because
// credentials and namespaces belong to a thread, and exec gives the program the ones of the calling thread.

const (
	childName = "msb-container"

	// The portal, as the container's main process, gets up to handOvers files at the descriptors from handOverFD on: two cgroups
	// (see cgroup.handOver), and the socket over which it gets its connections (see Container.PortalSocket). For other
	// processes, they are closed.
	handOverFD = 3
	handOvers  = 3

	configFD  = handOverFD + handOvers
	controlFD = configFD + 1

	// maxReply is the maximum size in bytes of an encoded childReply.
	maxReply = 8 << 10
)

// childConfig is the configuration that the agent sends to a child.
type childConfig struct {
	// Container describes the container to build, if the child becomes a main process. It is nil for an exec.
	Container *containerConfig
	// Join is, for an exec, the pid of the main process of the container to enter.
	Join int
	// Portal says that the program is the portal. It is protected from the other processes in the container.
	Portal  bool
	Process *pb.Process
	// HandOvers is how many files the process gets from handOverFD on.
	HandOvers int

	// handOver are these files.
	handOver []*os.File
}

// childReply is the message that a child sends to the agent. An empty Error means that the child is ready to start the
// program.
type childReply struct {
	Error string
}

// RunIfChild runs the child and never returns if this process is a child. Otherwise it does nothing. The agent must
// call it first in main.
func RunIfChild() {
	if os.Args[0] == childName {
		childMain()
	}
}

// childMain prepares the process, waits for the agent to start it, and execs the program. It never returns.
func childMain() {
	runtime.LockOSThread()
	for fd := handOverFD; fd <= controlFD; fd++ {
		unix.CloseOnExec(fd)
	}
	// The container's processes can see this process. Keep them from reading its memory and binary.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	cfg, err := readConfig()
	if err != nil {
		childFail(err)
	}
	terminal, err := prepare(cfg)
	if err != nil {
		childFail(err)
	}
	childSend(childReply{}, terminal)
	var b [1]byte
	if n, err := unix.Read(controlFD, b[:]); err != nil || n != 1 {
		os.Exit(1) // the container was removed before it was started
	}
	for i := range cfg.HandOvers {
		if _, err := unix.FcntlInt(uintptr(handOverFD+i), unix.F_SETFD, 0); err != nil {
			childFail(fmt.Errorf("hand over descriptors: %w", err))
		}
	}
	slack := timerslack.Default
	if cfg.Portal {
		slack = timerslack.Service
	}
	if err := timerslack.Set(slack); err != nil {
		childFail(err)
	}
	childFail(execProgram(cfg.Process))
}

func readConfig() (childConfig, error) {
	var cfg childConfig
	f := os.NewFile(configFD, "config")
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&cfg); err != nil {
		return cfg, fmt.Errorf("read config: %w", err)
	}
	return cfg, nil
}

// childFail sends an error to the agent and exits.
func childFail(err error) {
	message := err.Error()
	if len(message) > maxReply/8 {
		message = message[:maxReply/8] // JSON may encode one byte as several bytes
	}
	childSend(childReply{Error: message}, -1)
	os.Exit(1)
}

// childSend sends a reply to the agent, with the terminal's master unless terminal is -1. On an error it exits.
func childSend(r childReply, terminal int) {
	data, err := json.Marshal(r)
	if err != nil {
		os.Exit(1)
	}
	var oob []byte
	if terminal >= 0 {
		oob = unix.UnixRights(terminal)
	}
	if err := unix.Sendmsg(controlFD, data, oob, nil, 0); err != nil {
		os.Exit(1)
	}
	if terminal >= 0 {
		unix.Close(terminal)
	}
}

// prepare does everything that needs the agent's privileges. It returns the master of the process's terminal, or -1 if
// the process has none.
func prepare(cfg childConfig) (terminal int, err error) {
	if cfg.Container != nil {
		err = buildContainer(cfg.Container)
	} else {
		err = joinContainer(cfg.Join)
	}
	if err != nil {
		return -1, err
	}
	terminal = -1
	if cfg.Process.Terminal {
		if terminal, err = openTerminal(cfg.Process, cfg.Container != nil); err != nil {
			return -1, fmt.Errorf("open terminal: %w", err)
		}
	}
	if c := cfg.Container; c != nil && c.ReadonlyRoot {
		set := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(unix.AT_FDCWD, "/", 0, set); err != nil {
			return -1, fmt.Errorf("make root read-only: %w", err)
		}
	}
	return terminal, nil
}

// joinContainer enters the cgroup and mount namespaces of the container's main process, which is process pid. The agent
// has already forked this process into the container's pid namespace.
func joinContainer(pid int) error {
	var files []*os.File
	defer func() { closeAll(files) }()
	kinds := []string{"cgroup", "mnt"}
	for _, kind := range kinds {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			return fmt.Errorf("the container's main process has exited: %w", err)
		}
		files = append(files, f)
	}
	// A thread that shares its root and working directory with other threads cannot change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	for i, f := range files {
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("enter %s namespace: %w", kinds[i], err)
		}
	}
	return nil
}

// openTerminal opens a terminal in the container's devpts and returns its master. It makes the terminal this process's
// standard streams and controlling terminal. If console is set, as for a main process, it also binds the terminal to
// /dev/console.
func openTerminal(p *pb.Process, console bool) (int, error) {
	master, err := unix.Open("/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /dev/pts/ptmx: %w", err)
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, fmt.Errorf("unlock: %w", err)
	}
	if size := p.ConsoleSize; size != nil {
		if err := resizeTerminal(master, size.Height, size.Width); err != nil {
			return -1, err
		}
	}
	// Open the peer through the master, because the container could replace the file with the peer's name.
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, fmt.Errorf("open peer: %w", errno)
	}
	slave := int(peer)
	defer unix.Close(slave)
	for fd := range 3 {
		if err := unix.Dup2(slave, fd); err != nil {
			return -1, err
		}
	}
	if err := unix.IoctlSetInt(0, unix.TIOCSCTTY, 0); err != nil {
		return -1, fmt.Errorf("set controlling terminal: %w", err)
	}
	if console {
		return master, bindConsole(slave)
	}
	return master, nil
}

func resizeTerminal(fd int, rows, columns uint32) error {
	size := &unix.Winsize{Row: uint16(min(rows, 1<<16-1)), Col: uint16(min(columns, 1<<16-1))}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// execProgram gives up the agent's privileges and execs the user's program. It returns only on an error.
func execProgram(p *pb.Process) error {
	if err := setRlimits(p.Rlimits); err != nil {
		return err
	}
	cwd := p.Cwd
	if cwd == "" {
		cwd = "/"
	}
	if err := os.MkdirAll(cwd, 0o755); err != nil {
		return fmt.Errorf("create working directory: %w", err)
	}
	for fd := range 3 {
		// The program's user must own its standard streams to be able to open /dev/stdout and the like.
		if err := unix.Fchown(fd, int(p.User.GetUID()), -1); err != nil {
			return fmt.Errorf("change owner of standard streams: %w", err)
		}
	}
	if err := socketfilter.Apply(); err != nil {
		return err
	}
	if err := setCredentials(p); err != nil {
		return err
	}
	if err := unix.Chdir(cwd); err != nil {
		return fmt.Errorf("enter working directory %q: %w", cwd, err)
	}
	unix.Umask(0o022)
	env := withHome(p.Env, p.User.GetUID())
	path, err := lookPath(p.Args[0], env)
	if err != nil {
		return err
	}
	if err := syscall.Exec(path, p.Args, env); err != nil {
		return fmt.Errorf("exec %q: %w", path, err)
	}
	return nil
}

// lookPath finds the program name as a shell does, with the PATH in env.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		file := filepath.Join(dir, name)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && unix.Access(file, unix.X_OK) == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("exec: %q: executable file not found in $PATH", name)
}

// withHome adds HOME to env, unless env has it. The value is the home directory of user uid in the container's
// /etc/passwd.
func withHome(env []string, uid uint32) []string {
	for _, e := range env {
		if strings.HasPrefix(e, "HOME=") {
			return env
		}
	}
	passwd, _ := os.ReadFile("/etc/passwd")
	return append(env, "HOME="+homeOf(string(passwd), uid))
}

// homeOf returns the home directory of user uid in passwd, the content of a passwd file, or "/" if the user has none.
func homeOf(passwd string, uid uint32) string {
	want := fmt.Sprint(uid)
	for line := range strings.Lines(passwd) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) >= 6 && f[2] == want && strings.HasPrefix(f[5], "/") {
			return f[5]
		}
	}
	return "/"
}
