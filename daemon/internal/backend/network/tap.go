package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

// parameters are the kernel parameters of a slot. The kernel copies those of IPv4 from the host.
var parameters = [][2]string{
	{"ipv6/conf/all/disable_ipv6", "1"},
	{"ipv6/conf/default/disable_ipv6", "1"},
	{"ipv4/ip_forward", "0"},
	{"ipv4/conf/all/log_martians", "0"}, // a guest must not fill the host's log
	{"ipv4/conf/default/log_martians", "0"},
	// A connection that msbd has closed keeps the namespace until its guest has confirmed that. If the guest has ended, this
	// takes 3 s instead of 2 minutes.
	{"ipv4/tcp_orphan_retries", "3"},
}

// setParameters sets the kernel parameters of the calling thread's network namespace.
func setParameters() error {
	for _, p := range parameters {
		path := filepath.Join("/proc/sys/net", p[0])
		err := os.WriteFile(path, []byte(p[1]), 0)
		if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return fmt.Errorf("set a kernel parameter: %w", withFix(err, "run a container with msbd privileged", unix.EROFS, unix.EACCES))
		}
	}
	return nil
}

// openTap creates the tap name in the calling thread's network namespace. The tap exists as long as its file is open.
func openTap(name string) (*os.File, error) {
	const device = "/dev/net/tun"
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		err = withFix(err, "load its module: modprobe tun; run a container with msbd with --device "+device, unix.ENOENT, unix.ENODEV, unix.ENXIO)
		err = withFix(err, "run a container with msbd with --device "+device, unix.EPERM)
		return nil, fmt.Errorf("open %s: %w", device, err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("create a tap: %w", err)
	}
	return os.NewFile(uintptr(fd), device), nil
}

// namespaceOf returns the network namespace of the tap with descriptor fd.
func namespaceOf(fd int) (*os.File, error) {
	namespace, err := unix.IoctlRetInt(fd, unix.TUNGETDEVNETNS)
	if err != nil {
		return nil, fmt.Errorf("get the network namespace of the tap: %w", err)
	}
	return os.NewFile(uintptr(namespace), "network namespace"), nil
}

// configureTap gives the tap in the calling thread's network namespace its addresses, and the kernel the guest's hardware
// address.
func configureTap() error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer handle.Close()
	tap, err := handle.LinkByName(tapName)
	if err != nil {
		return fmt.Errorf("find it: %w", err)
	}
	host, err := net.ParseMAC(hostMAC)
	if err == nil {
		err = handle.LinkSetHardwareAddr(tap, host)
	}
	if err != nil {
		return fmt.Errorf("set its hardware address: %w", err)
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: hostIP, Mask: net.CIDRMask(portalport.GuestAddress.Bits(), 32)}}
	if err := handle.AddrAdd(tap, address); err != nil {
		return fmt.Errorf("set its address: %w", err)
	}
	if err := handle.LinkSetUp(tap); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	guest, err := net.ParseMAC(portalport.GuestMAC)
	if err == nil {
		err = handle.NeighSet(&netlink.Neigh{LinkIndex: tap.Attrs().Index, State: netlink.NUD_PERMANENT, IP: guestIP, HardwareAddr: guest})
	}
	if err != nil {
		return fmt.Errorf("add the guest to its neighbors: %w", err)
	}
	return nil
}
