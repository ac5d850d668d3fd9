// Package network configures the guest's network interfaces, routes and neighbor table as the host requests.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/devices"
	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
)

const (
	ipv6Dir = "/proc/sys/net/ipv6/conf"
	// maxRenames is how often renameLink renames another interface that has the requested name before it gives up.
	maxRenames = 32
	// maxMTU is the largest MTU that a request may set.
	maxMTU = 1<<16 - 1
)

// pingGroups is the range of the groups that may send ICMP echo requests without CAP_NET_RAW, which the sandbox's container does
// not have.
const pingGroups, allGroups = "/proc/sys/net/ipv4/ping_group_range", "0 2147483647"

// SetUp brings the loopback interface up, configures the IPv6 defaults of all interfaces, and permits ping to everybody.
func SetUp(log *slog.Logger) error {
	if err := os.WriteFile(pingGroups, []byte(allGroups), 0); err != nil {
		log.Warn("programs cannot use ping", "err", err)
	}
	configureIPv6(log, "all")
	configureIPv6(log, "default")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring loopback up: %w", err)
	}
	return nil
}

// UpdateInterface configures the interface with the MAC address in want. It sets the name, MTU, ARP flag and IP
// addresses in want and brings the interface up. It waits for the interface if the host has not plugged it in yet. It
// returns errdefs.ErrInvalidArgument if want is not valid, and errdefs.ErrNotFound if the interface does not appear.
func UpdateInterface(ctx context.Context, log *slog.Logger, want *protocols.Interface) (*protocols.Interface, error) {
	if want == nil || strings.Trim(want.Name, ".") == "" || len(want.Name) >= unix.IFNAMSIZ || strings.ContainsAny(want.Name, "/: \t\n\x00") {
		return nil, refusal.Invalid("invalid interface name %q", want.GetName())
	}
	if want.Mtu > maxMTU {
		return nil, refusal.Invalid("MTU %d of %s is larger than %d", want.Mtu, want.Name, maxMTU)
	}
	mac, err := net.ParseMAC(want.HwAddr)
	if err != nil {
		return nil, refusal.Invalid("MAC address of %s: %v", want.Name, err)
	}
	addrs, err := parseAddresses(want.IPAddresses)
	if err != nil {
		return nil, err
	}
	link, err := findLink(ctx, mac)
	if err != nil {
		return nil, err
	}
	if err := renameLink(link, want.Name); err != nil {
		return nil, err
	}
	if want.Mtu > 0 && int(want.Mtu) != link.Attrs().MTU {
		if err := netlink.LinkSetMTU(link, int(want.Mtu)); err != nil {
			return nil, fmt.Errorf("set MTU %d of %s: %w", want.Mtu, want.Name, err)
		}
	}
	setARP := netlink.LinkSetARPOn
	if want.RawFlags&unix.IFF_NOARP != 0 {
		setARP = netlink.LinkSetARPOff
	}
	if err := setARP(link); err != nil {
		return nil, fmt.Errorf("set ARP of %s: %w", want.Name, err)
	}
	configureIPv6(log, want.Name)
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", want.Name, err)
	}
	if err := replaceAddresses(link, addrs); err != nil {
		return nil, fmt.Errorf("set addresses of %s: %w", want.Name, err)
	}
	return want, nil
}

// renameLink renames link to name. The kernel does not number interfaces in the host's order, so another interface may
// have the name. renameLink then gives that interface a temporary name. The host later requests its final name.
func renameLink(link netlink.Link, name string) error {
	if link.Attrs().Name == name {
		return nil
	}
	for range maxRenames {
		err := setLinkName(link, name)
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		other, err := netlink.LinkByName(name)
		if err != nil {
			continue // the interface was removed in the meantime
		}
		if other.Attrs().Flags&net.FlagLoopback != 0 {
			return refusal.Invalid("interface name %q belongs to the loopback interface", name)
		}
		if err := setLinkName(other, fmt.Sprintf("aside%d", other.Attrs().Index)); err != nil {
			return err
		}
		// An interface that is plugged in at this moment may take the name, so try again.
	}
	return fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, name, unix.EEXIST)
}

func setLinkName(link netlink.Link, name string) error {
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("bring %s down: %w", link.Attrs().Name, err)
	}
	if err := netlink.LinkSetName(link, name); err != nil {
		return fmt.Errorf("rename %s to %s: %w", link.Attrs().Name, name, err)
	}
	return nil
}

// configureIPv6 makes sure that an interface has only the addresses and routes that the host assigns, and that its
// addresses work immediately. iface is the name of the interface, or "all" or "default".
//
// configureIPv6 turns off duplicate address detection. It is not needed, because the host assigns unique addresses.
// With it, an address would be tentative and accept no connections for a second. configureIPv6 also turns off router
// advertisements, because another sandbox might send them.
func configureIPv6(log *slog.Logger, iface string) {
	for _, setting := range []string{"accept_dad", "accept_ra"} {
		err := os.WriteFile(filepath.Join(ipv6Dir, iface, setting), []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			log.Warn("could not configure IPv6", "interface", iface, "setting", setting, "err", err)
		}
	}
}

// parseAddresses parses IP addresses. It skips IPv6 addresses if the kernel has no IPv6.
func parseAddresses(list []*protocols.IPAddress) ([]*netlink.Addr, error) {
	var addrs []*netlink.Addr
	for _, ip := range list {
		addr, err := netlink.ParseAddr(ip.GetAddress() + "/" + ip.GetMask())
		if err != nil {
			return nil, refusal.Invalid("invalid address %q with mask %q", ip.GetAddress(), ip.GetMask())
		}
		if addr.IP.To4() == nil {
			if !hasIPv6() {
				continue
			}
			addr.Flags = unix.IFA_F_NODAD
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

// findLink waits for the interface with the MAC address mac and returns it. It returns errdefs.ErrNotFound if the
// interface does not appear within the timeout of devices.WaitFor.
func findLink(ctx context.Context, mac net.HardwareAddr) (link netlink.Link, err error) {
	err = devices.WaitFor(ctx, func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr.String() == mac.String() {
				link = l
				return nil
			}
		}
		return devices.ErrNotYet
	})
	if err != nil {
		return nil, fmt.Errorf("find network interface with MAC address %s: %w", mac, err)
	}
	return link, nil
}

// hasIPv6 reports whether the kernel supports IPv6 and IPv6 is enabled.
func hasIPv6() bool {
	disabled, err := os.ReadFile(ipv6Dir + "/all/disable_ipv6")
	return err == nil && strings.TrimSpace(string(disabled)) == "0"
}

// replaceAddresses replaces the addresses of link by want. It keeps IPv6 link-local addresses, which the kernel
// assigns.
func replaceAddresses(link netlink.Link, want []*netlink.Addr) error {
	have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, h := range have {
		keep := h.IP.To4() == nil && h.IP.IsLinkLocalUnicast()
		for _, w := range want {
			keep = keep || h.Equal(*w)
		}
		if !keep {
			if err := netlink.AddrDel(link, &h); err != nil {
				return err
			}
		}
	}
	for _, w := range want {
		if err := netlink.AddrReplace(link, w); err != nil {
			return fmt.Errorf("%s: %w", w.IPNet, err)
		}
	}
	return nil
}

// Interfaces returns the network interfaces and their addresses.
func Interfaces() (*pb.Interfaces, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	result := &pb.Interfaces{}
	for _, l := range links {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		i := &protocols.Interface{
			Device: l.Attrs().Name,
			Name:   l.Attrs().Name,
			Mtu:    uint64(l.Attrs().MTU),
			HwAddr: l.Attrs().HardwareAddr.String(),
			Type:   l.Type(),
		}
		if l.Attrs().RawFlags&unix.IFF_NOARP != 0 {
			i.RawFlags = unix.IFF_NOARP
		}
		for _, addr := range addrs {
			ones, _ := addr.Mask.Size()
			i.IPAddresses = append(i.IPAddresses, &protocols.IPAddress{
				Family: family(addr.IP), Address: addr.IP.String(), Mask: strconv.Itoa(ones),
			})
		}
		result.Interfaces = append(result.Interfaces, i)
	}
	return result, nil
}

func family(ip net.IP) protocols.IPFamily {
	if ip.To4() == nil {
		return protocols.IPFamily_v6
	}
	return protocols.IPFamily_v4
}

// UpdateNeighbors adds or replaces entries of the neighbor table.
func UpdateNeighbors(ctx context.Context, neighbors []*protocols.ARPNeighbor) error {
	for _, n := range neighbors {
		if err := ctx.Err(); err != nil {
			return err // the caller has given up
		}
		ip := net.ParseIP(n.GetToIPAddress().GetAddress())
		if ip == nil {
			return refusal.Invalid("invalid neighbor address %q", n.GetToIPAddress().GetAddress())
		}
		var mac net.HardwareAddr
		if n.GetLladdr() != "" { // proxy entries have no MAC address
			var err error
			if mac, err = net.ParseMAC(n.Lladdr); err != nil {
				return refusal.Invalid("neighbor %s: %v", ip, err)
			}
		}
		link, err := netlink.LinkByName(n.Device)
		if err != nil {
			return fmt.Errorf("neighbor %s: interface %q: %w: %w", ip, n.Device, err, errdefs.ErrNotFound)
		}
		state := int(n.State)
		if state == 0 {
			state = netlink.NUD_PERMANENT
		}
		err = netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: state, Flags: int(n.Flags), IP: ip, HardwareAddr: mac,
		})
		if err != nil {
			return fmt.Errorf("set neighbor %s: %w", ip, err)
		}
	}
	return nil
}

// Stats returns the traffic of each network interface, except for loopback.
func Stats() ([]*pb.NetworkStats, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var stats []*pb.NetworkStats
	for _, l := range links {
		s := l.Attrs().Statistics
		if s == nil || l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		stats = append(stats, &pb.NetworkStats{
			Name:    l.Attrs().Name,
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		})
	}
	return stats, nil
}
