package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
)

// SetUpLink configures the interface to the host that package sys/portalport describes. It reports whether the machine has it.
// It adds no route to other networks, because the host leads to none: so a connection to elsewhere fails at once.
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
	return nil
}
