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

// prepareLimit bounds what a child does before it is ready to become the user's program.
const prepareLimit = 50 * time.Second

// Process is a program in the container: its main one or an exec.
type Process struct {
	reaper *Reaper
	pid    int
	stdin  *input
	stdout *output
	stderr *output // nil with a terminal
	// terminal is the master side of the process's terminal, if it has one.
	terminal *os.File

	// control leads to the child until it became the program.
	control *net.UnixConn

	exited chan struct{}
	status int // as a shell reports it; set before exited is closed
}

// spawn forks a child into a cgroup. The child prepares itself as cfg says and waits for start.
func spawn(r *Reaper, cgroup *os.File, cfg childConfig) (*Process, error) {
	p := &Process{reaper: r, exited: make(chan struct{})}
	var opened []*os.File // the child's ends, and on an error ours too
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	config, err := configFile(cfg)
	if err != nil {
		return nil, err
	}
	opened = append(opened, config)
	control, childControl, err := controlPair()
	if err != nil {
		return nil, err
	}
	opened = append(opened, childControl)
	p.control = control

	var stdio [3]*os.File
	var ours [3]*os.File
	for i := range stdio {
		if cfg.Process.Terminal {
			stdio[i], err = os.OpenFile("/dev/null", os.O_RDWR, 0)
		} else {
			stdio[i], ours[i], err = stdioPipe(i == 0)
		}
		if err != nil {
			control.Close()
			closeAll(ours[:])
			return nil, fmt.Errorf("make standard streams: %w", err)
		}
		opened = append(opened, stdio[i])
	}

	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: []uintptr{stdio[0].Fd(), stdio[1].Fd(), stdio[2].Fd(), config.Fd(), childControl.Fd()},
		Sys: &syscall.SysProcAttr{
			Setsid:      true,
			UseCgroupFD: true,
			CgroupFD:    int(cgroup.Fd()),
		},
	}
	// A container shares the guest's host name, IPC and network.
	if cfg.Container != nil {
		attr.Sys.Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID
		p.pid, err = r.start("/proc/self/exe", []string{childName}, attr, p.finish)
	} else {
		p.pid, err = startInPIDNamespace(r, cfg.Join, attr, p.finish)
	}
	if err != nil {
		control.Close()
		closeAll(ours[:])
		return nil, fmt.Errorf("fork: %w", err)
	}
	if !cfg.Process.Terminal {
		p.stdin = newInput(ours[0], false)
		p.stdout, p.stderr = newOutput(ours[1]), newOutput(ours[2])
	}
	for _, f := range opened {
		f.Close()
	}
	opened = nil

	if adj := cfg.Process.OOMScoreAdj; adj != 0 {
		file := fmt.Sprintf("/proc/%d/oom_score_adj", p.pid)
		if err := os.WriteFile(file, strconv.AppendInt(nil, adj, 10), 0); err != nil {
			p.discard()
			return nil, fmt.Errorf("set oom_score_adj: %w", err)
		}
	}
	_ = control.SetReadDeadline(time.Now().Add(prepareLimit))
	ready, err := p.reply()
	if err == nil && !ready {
		err = fmt.Errorf("it ended early: %w", errdefs.ErrFailedPrecondition)
	}
	if err == nil && cfg.Process.Terminal && p.terminal == nil {
		// The kernel drops a descriptor that finds no place here.
		err = fmt.Errorf("its terminal did not arrive: %w", errdefs.ErrResourceExhausted)
	}
	if err != nil {
		p.discard()
		return nil, fmt.Errorf("prepare process: %w", err)
	}
	go p.expire()
	return p, nil
}

// startInPIDNamespace forks from a thread whose children belong to the pid namespace of pid.
func startInPIDNamespace(r *Reaper, pid int, attr *syscall.ProcAttr, exited func(unix.WaitStatus)) (int, error) {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	if err != nil {
		return 0, fmt.Errorf("main process has ended: %w", errdefs.ErrFailedPrecondition)
	}
	defer ns.Close()
	type started struct {
		pid int
		err error
	}
	result := make(chan started)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its changed namespace
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID); err != nil {
			result <- started{err: fmt.Errorf("enter pid namespace: %w", err)}
			return
		}
		child, err := r.start("/proc/self/exe", []string{childName}, attr, exited)
		if errors.Is(err, unix.ENOMEM) {
			// A pid namespace whose first process is ending returns the same error.
			err = fmt.Errorf("main process is ending, or memory is short: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		result <- started{child, err}
	}()
	s := <-result
	return s.pid, s.err
}

// start lets the child become the program, and returns when it did or could not.
func (p *Process) start() error {
	defer p.control.Close()
	_ = p.control.SetDeadline(time.Now().Add(prepareLimit))
	if _, err := p.control.Write([]byte{1}); err != nil {
		return fmt.Errorf("start process: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	// The end of the channel without a word means that exec closed it.
	if _, err := p.reply(); err != nil {
		return err
	}
	return nil
}

// reply reads the child's word: ready or an error, and the master of its terminal. It is not
// ready when the child closed the channel.
func (p *Process) reply() (ready bool, err error) {
	buf := make([]byte, maxReply)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := p.control.ReadMsgUnix(buf, oob)
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	if errors.Is(err, unix.ECONNRESET) { // with our word unread
		return false, fmt.Errorf("it was killed before its start: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return false, err
	}
	if err := p.takeTerminal(oob[:oobn]); err != nil {
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

func (p *Process) takeTerminal(oob []byte) error {
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

// Signal sends a signal. A process that has ended needs none.
func (p *Process) Signal(sig unix.Signal) error { return p.reaper.signal(p.pid, sig) }

// Wait waits for the end of the process and returns its status as a shell reports it.
func (p *Process) Wait(ctx context.Context) (status int, err error) {
	select {
	case <-p.exited:
		return p.status, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// WriteStdin writes to the process's input, and waits while it does not read.
func (p *Process) WriteStdin(ctx context.Context, data []byte) (int, error) {
	return p.stdin.write(ctx, data)
}

// CloseStdin ends the process's input. A terminal has no end of its own.
func (p *Process) CloseStdin() { p.stdin.close() }

// ReadStdout waits for output and returns at most limit bytes of it. The error is io.EOF at the end.
func (p *Process) ReadStdout(ctx context.Context, limit int) ([]byte, error) {
	return p.stdout.read(ctx, limit)
}

// ReadStderr is like ReadStdout but for the other stream. A process with a terminal has none.
func (p *Process) ReadStderr(ctx context.Context, limit int) ([]byte, error) {
	if p.stderr == nil {
		return nil, io.EOF
	}
	return p.stderr.read(ctx, limit)
}

// Resize sets the size of the process's terminal.
func (p *Process) Resize(rows, columns uint32) error {
	if p.terminal == nil {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	raw, err := p.terminal.SyscallConn()
	if err != nil {
		return err
	}
	var resizeErr error
	err = raw.Control(func(fd uintptr) { resizeErr = resizeTerminal(int(fd), rows, columns) })
	if err != nil {
		return fmt.Errorf("terminal is closed: %w", errdefs.ErrFailedPrecondition)
	}
	return resizeErr
}

// ended reports whether the program is gone.
func (p *Process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// handles reports whether the program handles, ignores or blocks a signal.
func (p *Process) handles(sig unix.Signal) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	return err != nil || handlesSignal(string(status), sig)
}

// handlesSignal reports the same from the masks of a file like /proc/self/status.
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

// finish records the end. The reaper calls it.
func (p *Process) finish(ws unix.WaitStatus) {
	p.status = ws.ExitStatus()
	if ws.Signaled() {
		p.status = 128 + int(ws.Signal())
	}
	close(p.exited)
}

// expire ends the streams soon after the process.
func (p *Process) expire() {
	<-p.exited
	p.stdin.close()
	for _, o := range []*output{p.stdout, p.stderr} {
		if o != nil {
			o.expire()
		}
	}
}

// discard kills a child that never became a program and drops its streams.
func (p *Process) discard() {
	_ = p.Signal(unix.SIGKILL)
	<-p.exited
	p.control.Close()
	p.release()
}

// release frees the streams of an ended process.
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

// configFile returns an unlinked file that holds cfg for the child to read.
func configFile(cfg childConfig) (*os.File, error) {
	data, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("config", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make config file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "config")
	if _, err := f.WriteAt(data, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("write config file: %w", err)
	}
	return f, nil
}

// controlPair returns the channel between the agent and a child: whole messages, either way.
func controlPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make control channel: %w", err)
	}
	child := os.NewFile(uintptr(fds[1]), "control")
	f := os.NewFile(uintptr(fds[0]), "control")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		child.Close()
		return nil, nil, fmt.Errorf("make control channel: %w", err)
	}
	return conn.(*net.UnixConn), child, nil
}

// stdioPipe returns the child's blocking end and ours, which package os can wait on.
func stdioPipe(childReads bool) (child, ours *os.File, err error) {
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
