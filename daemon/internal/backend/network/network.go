// Package network makes the networks of sandboxes. A sandbox has a slot: a network namespace of its own, with a tap for
// the network interface of its guest. Nothing leads from the namespace to another network, and its rules drop
// everything but the connections that msbd makes from it to the guest.
//
// # Lifetimes
//
// No path on the host refers to a slot. The file of its tap keeps the namespace. So a slot lives as long as QEMU, or
// msbd, has the tap open, and nothing has to be removed. After a restart, msbd finds the slot again by QEMU's descriptor
// of the tap.
package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/thread"
)

const (
	hostMAC = "02:00:00:00:00:02"
	tapName = "tap0"
)

// The addresses of the guest and of the tap.
var guestIP, hostIP = net.IP(portalport.GuestAddress.Addr().AsSlice()), net.IP(portalport.HostAddress.AsSlice())

// A Slot is the network of one sandbox.
type Slot struct {
	tap       *os.File // nil if the slot was found
	namespace *os.File
}

// New creates a slot. It returns errdefs.ErrFailedPrecondition, with a message that says what to do, if the host lacks
// something. The caller must close the Slot.
func New() (*Slot, error) {
	var s *Slot
	err := thread.Run(func() (err error) {
		s, err = create()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create a network for a sandbox: %w", err)
	}
	return s, nil
}

// create creates a slot and moves the calling thread into its namespace.
func create() (_ *Slot, err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		err = withFix(err, "run msbd as root, and a container with msbd privileged", unix.EPERM)
		err = withFix(err, "allow more with: sysctl user.max_net_namespaces=65536", unix.ENOSPC)
		return nil, fmt.Errorf("create a network namespace: %w", err)
	}
	if err := setParameters(); err != nil {
		return nil, err
	}
	if err := addRules(); err != nil { // before there is an interface
		return nil, err
	}
	s := &Slot{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.tap, err = openTap(tapName); err != nil {
		return nil, err
	}
	if s.namespace, err = namespaceOf(int(s.tap.Fd())); err != nil {
		return nil, err
	}
	if err := configureTap(); err != nil {
		return nil, fmt.Errorf("configure the tap: %w", err)
	}
	return s, nil
}

// Find returns the slot whose tap process p has open as descriptor fd. The Slot has no Tap. The caller must close it.
func Find(p *process.Process, fd int) (*Slot, error) {
	tap, err := p.Descriptor(fd)
	if err != nil {
		return nil, fmt.Errorf("find the network of a sandbox: %w", err)
	}
	defer unix.Close(tap)
	namespace, err := namespaceOf(tap)
	if err != nil {
		return nil, fmt.Errorf("find the network of a sandbox by descriptor %d of process %d: %w", fd, p.PID, err)
	}
	return &Slot{namespace: namespace}, nil
}

// Check creates a slot and closes it. It returns the same errors as New.
func Check() error {
	s, err := New()
	if err != nil {
		return err
	}
	return s.Close()
}

// Tap returns the file of the tap of a slot from New. It is closed with the slot. QEMU gets a duplicate.
func (s *Slot) Tap() *os.File { return s.tap }

// Close closes the slot. Connections from Dial stay open. The namespace lives until they are closed and no process has
// the tap open.
func (s *Slot) Close() error {
	var errs []error
	for _, f := range []*os.File{s.tap, s.namespace} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Dial connects to a TCP port of the guest. If ctx ends first, it returns the cause of ctx.
func (s *Slot) Dial(ctx context.Context, port int) (net.Conn, error) {
	conn, err := s.dial(ctx, port)
	if err != nil {
		return nil, fmt.Errorf("connect to port %d of the guest: %w", port, err)
	}
	return conn, nil
}

func (s *Slot) dial(ctx context.Context, port int) (net.Conn, error) {
	var fd int
	// A socket stays in the namespace of the thread that creates it. All the rest can be done from elsewhere.
	err := thread.Run(func() (err error) {
		if err := s.enter(); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	socket := os.NewFile(uintptr(fd), "socket")
	defer socket.Close()
	if err := connect(ctx, socket, &unix.SockaddrInet4{Port: port, Addr: [4]byte(guestIP)}); err != nil {
		return nil, err
	}
	return net.FileConn(socket) // which sets the same options as net.Dial
}

// enter moves the calling thread into the namespace.
func (s *Slot) enter() error {
	conn, err := s.namespace.SyscallConn() // unlike Fd, safe if the slot is closed at the same time
	if err != nil {
		return err
	}
	if closed := conn.Control(func(fd uintptr) { err = unix.Setns(int(fd), unix.CLONE_NEWNET) }); closed != nil {
		return closed
	}
	return err
}

// connect connects a socket that does not block. If ctx ends first, it returns the cause of ctx.
func connect(ctx context.Context, socket *os.File, to unix.Sockaddr) error {
	conn, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = socket.SetWriteDeadline(time.Unix(1, 0)) })()
	// The first call starts to connect. Later ones return the result.
	waitErr := conn.Write(func(fd uintptr) bool {
		err = unix.Connect(int(fd), to)
		return err != unix.EINPROGRESS && err != unix.EALREADY && err != unix.EINTR
	})
	switch {
	case waitErr != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case waitErr != nil:
		return waitErr
	}
	return os.NewSyscallError("connect", err)
}

// withFix adds fix to err if err is one of causes, which means that the host lacks something.
func withFix(err error, fix string, causes ...unix.Errno) error {
	for _, cause := range causes {
		if errors.Is(err, cause) {
			return fmt.Errorf("%w; %s: %w", err, fix, errdefs.ErrFailedPrecondition)
		}
	}
	return err
}
