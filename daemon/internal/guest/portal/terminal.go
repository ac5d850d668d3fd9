package portal

import (
	"os"

	"golang.org/x/sys/unix"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// openTerminal opens a pseudo-terminal. master does not block, and peer, which is the standard streams of a program, does.
func openTerminal(size *portalv1.TerminalSize) (master, peer *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	master = os.NewFile(uintptr(fd), "terminal")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		master.Close()
		return nil, nil, os.NewSyscallError("unlock terminal", err)
	}
	// Open the peer through the master, because a process of the sandbox could replace the file with the peer's name.
	flags := uintptr(unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC)
	peerFD, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, flags)
	if errno != 0 {
		master.Close()
		return nil, nil, os.NewSyscallError("open the peer of the terminal", errno)
	}
	peer = os.NewFile(peerFD, "terminal")
	if err := resize(master, size); err != nil {
		master.Close()
		peer.Close()
		return nil, nil, err
	}
	return master, peer, nil
}

// resize sets the size of a terminal.
func resize(master *os.File, size *portalv1.TerminalSize) error {
	window := &unix.Winsize{Row: uint16(size.GetRows()), Col: uint16(size.GetColumns())}
	return control(master, func(fd int) error {
		return os.NewSyscallError("resize terminal", unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, window))
	})
}

// newTerminalOutput returns the output on a terminal. Closing the output does not close master. The other parameters are
// those of newOutput.
func newTerminalOutput(emit emitFunc, discard *discarder, master *os.File) (o *output, err error) {
	err = control(master, func(fd int) error {
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		if o, err = newOutput(emit, discard, source{stream: tty, fd: copied}); err != nil {
			unix.Close(copied)
		}
		return err
	})
	return o, err
}

// control calls f with the descriptor of file.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(int(fd)) }); err != nil {
		return err
	}
	return result
}
