package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// prepareTimeout bounds the time that a child takes to prepare its process. The same limit applies again to the time
// between start and the exec of the program.
const prepareTimeout = 50 * time.Second

// Process is a process in the container: the main process or an exec.
type Process struct {
	reaper *Reaper
	pid    int
	stdin  *input
	stdout *output
	stderr *output // nil with a terminal
	// terminal is the master side of the process's terminal, if it has one.
	terminal *os.File

	// control is the connection to the child, until the child has become the program.
	control *net.UnixConn

	exited chan struct{} // closed when the process has exited
	status int           // as a shell reports it; set before exited is closed
}

// spawn forks a child into cgroup and waits until the child has prepared its process according to cfg. The child then
// waits for start.
func spawn(r *Reaper, cgroup *os.File, cfg childConfig) (*Process, error) {
	p := &Process{reaper: r, exited: make(chan struct{})}
	var opened []*os.File // descriptors that only the child needs
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	cfg.HandOvers = len(cfg.handOver)
	config, err := configFile(cfg)
	if err != nil {
		return nil, err
	}
	opened = append(opened, config)
	control, childControl, err := socketPair("control")
	if err != nil {
		return nil, err
	}
	opened = append(opened, childControl)
	p.control = control

	var stdio [3]*os.File
	var agentEnds [3]*os.File
	for i := range stdio {
		if cfg.Process.Terminal {
			stdio[i], err = os.OpenFile("/dev/null", os.O_RDWR, 0)
		} else {
			stdio[i], agentEnds[i], err = stdioPipe(i == 0)
		}
		if err != nil {
			control.Close()
			closeAll(agentEnds[:])
			return nil, fmt.Errorf("open standard streams: %w", err)
		}
		opened = append(opened, stdio[i])
	}

	files := []uintptr{stdio[0].Fd(), stdio[1].Fd(), stdio[2].Fd()}
	for i := range handOvers {
		fd := ^uintptr(0) // closed
		if i < len(cfg.handOver) {
			fd = cfg.handOver[i].Fd()
		}
		files = append(files, fd)
	}
	files = append(files, config.Fd(), childControl.Fd())
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: files,
		Sys: &syscall.SysProcAttr{
			Setsid:      true,
			UseCgroupFD: true,
			CgroupFD:    int(cgroup.Fd()),
		},
	}
	// A container gets new mount and pid namespaces. It shares the guest's host name, IPC and network.
	if cfg.Container != nil {
		attr.Sys.Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID
		p.pid, err = r.start("/proc/self/exe", []string{childName}, attr, p.recordExit)
	} else {
		p.pid, err = startInPIDNamespace(r, cfg.Join, attr, p.recordExit)
	}
	if err != nil {
		control.Close()
		closeAll(agentEnds[:])
		return nil, fmt.Errorf("fork: %w", err)
	}
	if !cfg.Process.Terminal {
		p.stdin = newInput(agentEnds[0], false)
		p.stdout, p.stderr = newOutput(agentEnds[1]), newOutput(agentEnds[2])
	}
	for _, f := range opened {
		f.Close()
	}
	opened = nil

	adj := cfg.Process.OOMScoreAdj
	if cfg.Portal {
		adj = portalOOMScoreAdj
	}
	if adj != 0 {
		file := fmt.Sprintf("/proc/%d/oom_score_adj", p.pid)
		if err := os.WriteFile(file, strconv.AppendInt(nil, adj, 10), 0); err != nil {
			p.discard()
			return nil, fmt.Errorf("set oom_score_adj: %w", err)
		}
	}
	_ = control.SetReadDeadline(time.Now().Add(prepareTimeout))
	ready, err := p.reply()
	if err == nil && !ready {
		err = fmt.Errorf("the child exited before it was ready: %w", errdefs.ErrFailedPrecondition)
	}
	if err == nil && cfg.Process.Terminal && p.terminal == nil {
		// The kernel drops a descriptor if the agent has too many open files.
		err = fmt.Errorf("the child's terminal did not arrive: %w", errdefs.ErrResourceExhausted)
	}
	if err != nil {
		p.discard()
		return nil, fmt.Errorf("prepare process: %w", err)
	}
	go p.endAfterExit()
	return p, nil
}

// startInPIDNamespace forks a child into the pid namespace of the process pid.
func startInPIDNamespace(r *Reaper, pid int, attr *syscall.ProcAttr, exited func(unix.WaitStatus)) (int, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return 0, fmt.Errorf("the container's main process has exited: %w", errdefs.ErrFailedPrecondition)
	}
	defer ns.Close()
	type started struct {
		pid int
		err error
	}
	result := make(chan started)
	go func() {
		// Setns changes the namespace only for children of this thread. The thread is never unlocked, so Go ends it with
		// the goroutine and does not run other goroutines in the changed namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID); err != nil {
			result <- started{err: fmt.Errorf("enter pid namespace: %w", err)}
			return
		}
		child, err := r.start("/proc/self/exe", []string{childName}, attr, exited)
		if errors.Is(err, unix.ENOMEM) {
			// The kernel also returns ENOMEM if the first process of the pid namespace is exiting.
			err = fmt.Errorf("the container's main process is exiting, or the guest is out of memory: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		result <- started{child, err}
	}()
	s := <-result
	return s.pid, s.err
}

// start makes the child exec the program. It returns when the program has started or could not be started.
func (p *Process) start() error {
	defer p.control.Close()
	_ = p.control.SetDeadline(time.Now().Add(prepareTimeout))
	if _, err := p.control.Write([]byte{1}); err != nil {
		return fmt.Errorf("start process: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	// A successful exec closes the channel. So if the channel ends without a reply, the program has started.
	if _, err := p.reply(); err != nil {
		return err
	}
	return nil
}

// reply reads a reply from the child. If the master of the child's terminal comes with it, reply stores that in p.
// ready is true if the child is ready, and false if the child has closed the channel. If the reply has an error, reply
// returns it.
func (p *Process) reply() (ready bool, err error) {
	buf := make([]byte, maxReply)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.control.ReadMsgUnix(buf, oob)
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	if errors.Is(err, unix.ECONNRESET) { // the child ended without reading our message
		return false, fmt.Errorf("the child was killed before it started the program: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return false, err
	}
	if err := p.receiveTerminal(oob[:oobn]); err != nil {
		return false, err
	}
	var r childReply
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return false, fmt.Errorf("read reply: %w", err)
	}
	if r.Error != "" {
		return false, fmt.Errorf("%s: %w", r.Error, errdefs.ErrFailedPrecondition)
	}
	return true, nil
}

// receiveTerminal takes the terminal's master out of oob, a message's ancillary data, if there is any.
func (p *Process) receiveTerminal(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("receive terminal: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("receive terminal: %w", err)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return err
	}
	p.terminal = os.NewFile(uintptr(fds[0]), "terminal")
	p.stdin = newInput(p.terminal, true)
	p.stdout = newOutput(p.terminal)
	return nil
}

// Signal sends a signal to the process. It does nothing if the process has exited.
func (p *Process) Signal(sig unix.Signal) error { return p.reaper.signal(p.pid, sig) }

// Wait waits until the process has exited. It returns the process's status as a shell reports it, which is 128+N after
// signal N.
func (p *Process) Wait(ctx context.Context) (status int, err error) {
	select {
	case <-p.exited:
		return p.status, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// WriteStdin writes data to the process's standard input. It waits until the process has read data, the pipe has room
// for data, or ctx is done.
func (p *Process) WriteStdin(ctx context.Context, data []byte) (int, error) {
	return p.stdin.write(ctx, data)
}

// CloseStdin closes the process's standard input. It does nothing for a terminal, which is also the output.
func (p *Process) CloseStdin() { p.stdin.close() }

// ReadStdout waits for output and returns at most limit bytes of it. It returns io.EOF at the end of the output.
func (p *Process) ReadStdout(ctx context.Context, limit int) ([]byte, error) {
	return p.stdout.read(ctx, limit)
}

// ReadStderr is like ReadStdout but for standard error. For a process with a terminal it returns io.EOF.
func (p *Process) ReadStderr(ctx context.Context, limit int) ([]byte, error) {
	if p.stderr == nil {
		return nil, io.EOF
	}
	return p.stderr.read(ctx, limit)
}

// Resize sets the size of the process's terminal.
func (p *Process) Resize(rows, columns uint32) error {
	if p.terminal == nil {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := p.terminal.SyscallConn()
	if err != nil {
		return err
	}
	var resizeErr error
	err = raw.Control(func(fd uintptr) { resizeErr = resizeTerminal(int(fd), rows, columns) })
	if err != nil {
		return fmt.Errorf("the terminal is closed: %w", errdefs.ErrFailedPrecondition)
	}
	return resizeErr
}

// ended reports whether the process has exited.
func (p *Process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// handles reports whether the process handles, ignores or blocks sig. It returns true if it cannot find out.
func (p *Process) handles(sig unix.Signal) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	return err != nil || handlesSignal(string(status), sig)
}

// handlesSignal reports whether the signal masks in status, the content of a file /proc/PID/status, contain sig.
func handlesSignal(status string, sig unix.Signal) bool {
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name != "SigBlk" && name != "SigIgn" && name != "SigCgt" {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && mask&(1<<(sig-1)) != 0 {
			return true
		}
	}
	return false
}

// recordExit sets the exit status and closes exited. The reaper calls it.
func (p *Process) recordExit(ws unix.WaitStatus) {
	p.status = ws.ExitStatus()
	if ws.Signaled() {
		p.status = 128 + int(ws.Signal())
	}
	close(p.exited)
}

// endAfterExit waits until the process has exited. It then closes the process's input, and ends its output streams
// after exitGrace.
func (p *Process) endAfterExit() {
	<-p.exited
	p.stdin.close()
	for _, o := range []*output{p.stdout, p.stderr} {
		if o != nil {
			o.endAfterExit()
		}
	}
}

// discard kills a child that has not become a program and releases its streams.
func (p *Process) discard() {
	_ = p.Signal(unix.SIGKILL)
	<-p.exited
	p.control.Close()
	p.release()
}

// release closes the streams of a process that has exited.
func (p *Process) release() {
	if p.stdin != nil {
		p.stdin.file.Close()
	}
	for _, o := range []*output{p.stdout, p.stderr} {
		if o != nil {
			o.abandon()
		}
	}
}

// configFile returns an anonymous file with cfg, which the child reads.
func configFile(cfg childConfig) (*os.File, error) {
	data, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create config file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "config")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write config file: %w", err)
	}
	return f, nil
}

// socketPair returns the agent's and the child's end of a channel that carries messages in both directions. name is for
// errors.
func socketPair(name string) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("create %s channel: %w", name, err)
	}
	child := os.NewFile(uintptr(fds[1]), name)
	f := os.NewFile(uintptr(fds[0]), name)
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		child.Close()
		return nil, nil, fmt.Errorf("create %s channel: %w", name, err)
	}
	return conn.(*net.UnixConn), child, nil
}

// stdioPipe returns the ends of a pipe for a standard stream. The child's end blocks, as programs expect. The agent's end
// does not block, so that package os can wait for it with deadlines.
func stdioPipe(childReads bool) (child, agent *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	c, o := fds[1], fds[0]
	if childReads {
		c, o = fds[0], fds[1]
	}
	child = os.NewFile(uintptr(c), "stdio")
	if err := unix.SetNonblock(o, true); err != nil {
		child.Close()
		unix.Close(o)
		return nil, nil, err
	}
	return child, os.NewFile(uintptr(o), "stdio"), nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
