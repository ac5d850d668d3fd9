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

// SetUpLink configures the interface to the host that package sys/portalport describes. It reports whether the machine has it.
// It does not wait for it, because the host does not plug it in later.
func SetUpLink() (found bool, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return false, fmt.Errorf("list interfaces: %w", err)
	}
	for _, link := range links {
		if link.Attrs().HardwareAddr.String() != portalport.GuestMAC {
			continue
		}
		if err := setUpLink(link); err != nil {
			return false, fmt.Errorf("set up the interface %s to the host: %w", link.Attrs().Name, err)
		}
		return true, nil
	}
	return false, nil
}

func setUpLink(link netlink.Link) error {
	// The host routes no IPv6 for sandboxes. The kernel may have none.
	err := os.WriteFile(filepath.Join(ipv6Dir, link.Attrs().Name, "disable_ipv6"), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := netlink.LinkSetMTU(link, portalport.MTU); err != nil {
		return fmt.Errorf("set MTU: %w", err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   portalport.GuestAddress.Addr().AsSlice(),
		Mask: net.CIDRMask(portalport.GuestAddress.Bits(), 32),
	}}
	if err := replaceAddresses(link, []*netlink.Addr{addr}); err != nil {
		return fmt.Errorf("set address: %w", err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index, Gw: portalport.HostAddress.AsSlice(), Protocol: unix.RTPROT_BOOT,
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route: %w", err)
	}
	return nil
}
