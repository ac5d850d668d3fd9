// Package channel accepts the host's connections to the guest agent, over virtio-serial ports or vsock.
package channel

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// portName is the name of the virtio-serial port that the hypervisor provides for the agent.
	portName = "kata.agent.0"
	// vsockPort is the port that Kata's shim dials in a guest with a vsock device.
	vsockPort = 1024
	// portTimeout bounds the wait for the virtio-serial port, which the kernel creates some time after its driver is
	// loaded.
	portTimeout = 10 * time.Second
	// portPause is the time between two looks for the port for which the boot waits.
	portPause = 2 * time.Millisecond
	// sysPorts is the directory in sysfs that lists the virtio-serial ports.
	sysPorts = "/sys/class/virtio-ports"
)

// Listen returns a listener for each channel that this machine has. It returns an error if there is none. The listeners
// are wrapped with RequestsOnly. hangUp ends the connection over the virtio-serial port, if there is one (see
// portListener.HangUp).
func Listen() (listeners []net.Listener, hangUp func(), err error) {
	hangUp = func() {}
	if l, err := listenVsock(vsockPort); err == nil {
		listeners = append(listeners, RequestsOnly(l))
	}
	timeout := portTimeout
	if len(listeners) > 0 {
		timeout = 0
	}
	device, err := findPort(sysPorts, portName, timeout, portPause)
	if err == nil {
		l, err := listenPort("/dev/" + device)
		if err != nil {
			return nil, nil, err
		}
		hangUp = l.HangUp
		listeners = append(listeners, RequestsOnly(ttrpcListener{l}))
	} else if len(listeners) == 0 {
		return nil, nil, err
	}
	return listeners, hangUp, nil
}

// ListenPort returns a listener on the virtio-serial port name. It returns an error if the machine has no such port within
// portTimeout. Until then it looks for the port only now and then, so that a guest without the port loses no time. The
// listener has one connection at a time. A client that connects as soon as the one before has disconnected may continue
// its connection.
func ListenPort(name string) (net.Listener, error) {
	device, err := findPort(sysPorts, name, portTimeout, 20*portPause)
	if err != nil {
		return nil, err
	}
	l, err := listenPort("/dev/" + device)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// findPort returns the device name of the virtio-serial port name. It waits up to timeout for the port, with a pause
// between two looks. sysfs is the directory that lists the ports.
func findPort(sysfs, name string, timeout, pause time.Duration) (string, error) {
	for end := time.Now().Add(timeout); ; time.Sleep(pause) {
		files, _ := filepath.Glob(filepath.Join(sysfs, "*", "name"))
		for _, f := range files {
			if data, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(data)) == name {
				return filepath.Base(filepath.Dir(f)), nil
			}
		}
		if time.Now().After(end) {
			return "", fmt.Errorf("no virtio-serial port %s", name)
		}
	}
}

type channelAddr string

func (a channelAddr) Network() string { return "guest" }
func (a channelAddr) String() string  { return string(a) }

// vsockListener accepts vsock connections from the host only. Otherwise a process in a container could call the agent
// if the kernel supports vsock loopback. Package net does not support vsock.
type vsockListener struct {
	file *os.File
	raw  interface {
		Read(func(uintptr) bool) error
	}
}

// listenVsock listens on a vsock port. It returns an error if this machine has no vsock device.
func listenVsock(port uint32) (net.Listener, error) {
	if err := requireVsockDevice(); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a vsock socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "vsock")
	err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: port})
	if err == nil {
		err = unix.Listen(fd, 8)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &vsockListener{f, raw}, nil
}

// requireVsockDevice returns an error if this machine has no vsock device. Listening would succeed without one.
func requireVsockDevice() error {
	f, err := os.Open("/dev/vsock")
	if err != nil {
		return err
	}
	defer f.Close()
	cid, err := unix.IoctlGetUint32(int(f.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
	if err != nil {
		return err
	}
	if cid == unix.VMADDR_CID_ANY {
		return errors.New("no vsock device")
	}
	return nil
}

func (l *vsockListener) Addr() net.Addr { return channelAddr(fmt.Sprintf("vsock:%d", vsockPort)) }
func (l *vsockListener) Close() error   { return l.file.Close() }

func (l *vsockListener) Accept() (net.Conn, error) {
	var fd int
	var acceptErr error
	err := l.raw.Read(func(listener uintptr) bool {
		for {
			var caller unix.Sockaddr
			fd, caller, acceptErr = unix.Accept4(int(listener), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			if vm, ok := caller.(*unix.SockaddrVM); acceptErr == nil && !(ok && vm.CID == unix.VMADDR_CID_HOST) {
				unix.Close(fd)
				continue
			}
			// After these errors, accept the next connection. They concern a single connection, or none.
			if acceptErr != unix.EINTR && acceptErr != unix.ECONNABORTED && acceptErr != unix.ECONNRESET {
				return acceptErr != unix.EAGAIN
			}
		}
	})
	if err == nil {
		err = acceptErr // not wrapped, so that the server recognizes temporary errors and tries again
	}
	if err != nil {
		return nil, err
	}
	return vsockConn{os.NewFile(uintptr(fd), "vsock connection")}, nil
}

// vsockConn is a connected vsock socket as a net.Conn.
type vsockConn struct{ *os.File }

func (vsockConn) LocalAddr() net.Addr  { return channelAddr("vsock") }
func (vsockConn) RemoteAddr() net.Addr { return channelAddr("vsock") }
