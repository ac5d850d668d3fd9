// Package channel is how the guest agent hears from the host: a virtio-serial port or vsock.
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
	// portName is the virtio-serial port that the hypervisor gives the agent.
	portName = "kata.agent.0"
	// vsockPort is where Kata's shim dials a guest that has a vsock device.
	vsockPort = 1024
	// portLimit bounds the wait for the port: the kernel makes it after its driver was loaded.
	portLimit = 10 * time.Second
)

// Listen returns a listener for each channel that this machine has, and at least one. Their connections
// carry requests only, as those of RequestsOnly do.
func Listen() ([]net.Listener, error) {
	var listeners []net.Listener
	if l, err := listenVsock(vsockPort); err == nil {
		listeners = append(listeners, RequestsOnly(l))
	}
	limit := portLimit
	if len(listeners) > 0 {
		limit = 0
	}
	device, err := findPort("/sys/class/virtio-ports", portName, limit)
	if err == nil {
		l, err := listenPort("/dev/" + device)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, RequestsOnly(l))
	} else if len(listeners) == 0 {
		return nil, err
	}
	return listeners, nil
}

// findPort returns the device name of the virtio-serial port called name.
func findPort(sysfs, name string, limit time.Duration) (string, error) {
	for end := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
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

// vsockListener accepts connections of the host, and of nobody else: where the kernel loops vsock back, a process in a
// container could call the agent. Package net has no vsock.
type vsockListener struct {
	file *os.File
	raw  interface {
		Read(func(uintptr) bool) error
	}
}

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

// requireVsockDevice returns an error unless this machine has the device. A socket would listen without it.
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
			// A caller that gave up is nobody's fault.
			if acceptErr != unix.EINTR && acceptErr != unix.ECONNABORTED && acceptErr != unix.ECONNRESET {
				return acceptErr != unix.EAGAIN
			}
		}
	})
	if err == nil {
		err = acceptErr // as it is: the server tries again after what is temporary
	}
	if err != nil {
		return nil, err
	}
	return vsockConn{os.NewFile(uintptr(fd), "vsock connection")}, nil
}

// vsockConn makes a net.Conn of a connected socket.
type vsockConn struct{ *os.File }

func (vsockConn) LocalAddr() net.Addr  { return channelAddr("vsock") }
func (vsockConn) RemoteAddr() net.Addr { return channelAddr("vsock") }
