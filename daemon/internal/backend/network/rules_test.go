package network

import (
	"errors"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Addresses that only TestRules uses.
const (
	forgedAddress   = "10.0.2.77"
	guestAddress6   = "fd00:0:a00:20f::15" // a packet from it has GuestAddress where one of IPv4 has its source
	hostAddress6    = "fd00:0:a00:20f::2"
	outsideAddress  = "192.0.2.2"
	outsideGateway  = "192.0.2.1"
	outsideHardware = "02:00:00:00:00:03"
	udpPort         = 1000
	tcpPort         = 1001
)

// edit changes interfaces in the namespace of s.
func edit(t *testing.T, s *Slot, link string, change func(h *netlink.Handle, link netlink.Link) error) {
	t.Helper()
	in(t, s, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		l, err := h.LinkByName(link)
		if err != nil {
			return err
		}
		return change(h, l)
	})
}

func parseAddr(t *testing.T, s string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(s)
	if err != nil {
		t.Fatal(err)
	}
	a.Flags = unix.IFA_F_NODAD
	return a
}

func neighbor(t *testing.T, link netlink.Link, ip, mac string) *netlink.Neigh {
	t.Helper()
	hardware, err := net.ParseMAC(mac)
	if err != nil {
		t.Fatal(err)
	}
	return &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(ip), HardwareAddr: hardware}
}

// listenUDP opens a socket in the namespace of s until the end of the test.
func listenUDP(t *testing.T, s *Slot, ip string, port int) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	in(t, s, func() (err error) {
		conn, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(ip), Port: port})
		return err
	})
	t.Cleanup(func() { conn.Close() })
	return conn
}

// received returns what conn, a socket or a tap that does not block, has received.
func received(t *testing.T, conn syscall.Conn) (messages []string) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		buf := make([]byte, 1<<17)
		for {
			n, err := unix.Read(int(fd), buf)
			if err != nil {
				return
			}
			messages = append(messages, string(buf[:n]))
		}
	})
	return messages
}

// startConnect starts to connect from the namespace of s. The function that it returns reports whether there was no answer.
func startConnect(t *testing.T, s *Slot, ip net.IP, port int) (silent func() bool) {
	t.Helper()
	fd := -1
	in(t, s, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte(ip.To4())}); err != unix.EINPROGRESS {
		t.Fatalf("connect to %s: %v", ip, err)
	}
	return func() bool {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		const synSent = 2
		return err == nil && info.State == synSent
	}
}

// A guest reaches nothing: not the host's end of its network, not through it, and not with a forged source or IPv6. And
// nothing but msbd's connections reaches the guest. The frames of a guest pass through its tap in order, so when the
// answer to a message has come, everything that the guest sent before has come, or was dropped.
func TestRules(t *testing.T) {
	s, guest := newSlot(t), newGuest(t)
	port := serveEcho(t, guest)
	startWire(t, s, guest)
	conn := dial(t, s, port)
	var tcp *net.TCPListener
	in(t, s, func() (err error) {
		tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{Port: tcpPort})
		return err
	})
	defer tcp.Close()
	targets := []string{hostIP.String(), outsideAddress, "198.51.100.1", "169.254.169.254"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs { // the host's own
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() != nil && !ip.IP.IsLoopback() {
			targets = append(targets, ip.IP.String())
		}
	}
	silent := map[string]func() bool{}
	for _, target := range targets {
		silent[target] = startConnect(t, guest, net.ParseIP(target), tcpPort)
	}
	checkEcho(t, conn, "the guest's requests have come")
	checkEcho(t, conn, "what answers them would have come")
	for target, is := range silent {
		if !is() {
			t.Errorf("there was an answer from %s", target)
		}
	}

	var outside *os.File // the tap of the way out
	edit(t, s, tapName, func(h *netlink.Handle, tap netlink.Link) error {
		addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
		if err != nil || len(addrs) != 1 || addrs[0].IPNet.String() != hostIP.String()+"/24" {
			t.Errorf("addresses of the slot: %v, %v", addrs, err)
		}
		// Now give the slot what the rules protect: IPv6, and a way out.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", []byte("0"), 0); err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			return err
		}
		if outside, err = openTap("out0"); err != nil {
			return err
		}
		t.Cleanup(func() { outside.Close() })
		if err := errors.Join(unix.SetNonblock(int(outside.Fd()), true), h.AddrAdd(tap, parseAddr(t, hostAddress6+"/64"))); err != nil {
			return err
		}
		out, err := h.LinkByName("out0")
		if err != nil {
			return err
		}
		return errors.Join(h.AddrAdd(out, parseAddr(t, outsideGateway+"/24")), h.LinkSetUp(out), h.NeighAdd(neighbor(t, out, outsideAddress, outsideHardware)))
	})
	edit(t, guest, "eth0", func(h *netlink.Handle, eth0 netlink.Link) error {
		return errors.Join(h.AddrAdd(eth0, parseAddr(t, forgedAddress+"/24")), h.AddrAdd(eth0, parseAddr(t, guestAddress6+"/64")),
			h.NeighAdd(neighbor(t, eth0, hostAddress6, hostMAC)))
	})
	listeners := []*net.UDPConn{listenUDP(t, s, hostIP.String(), udpPort), listenUDP(t, s, hostAddress6, udpPort)}
	senders := map[string]struct {
		conn *net.UDPConn
		to   string
	}{
		"IPv4":     {listenUDP(t, guest, guestIP.String(), 0), hostIP.String()},
		"forged":   {listenUDP(t, guest, forgedAddress, 0), hostIP.String()},
		"IPv6":     {listenUDP(t, guest, guestAddress6, 0), hostAddress6},
		"outbound": {listenUDP(t, guest, guestIP.String(), 0), outsideAddress},
	}
	slotUDP := listenUDP(t, s, hostIP.String(), 0)

	// arrive returns what arrives of the datagrams that the guest sends to the slot and through it.
	arrive := func() string {
		t.Helper()
		var arrived []string
		for _, name := range slices.Sorted(maps.Keys(senders)) {
			if _, err := senders[name].conn.WriteTo([]byte(name), &net.UDPAddr{IP: net.ParseIP(senders[name].to), Port: udpPort}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		checkEcho(t, conn, "the connection of msbd")
		for _, l := range listeners {
			arrived = append(arrived, received(t, l)...)
		}
		for _, frame := range received(t, outside) {
			if strings.HasSuffix(frame, "outbound") {
				arrived = append(arrived, "outbound")
			}
		}
		return strings.Join(arrived, ", ")
	}
	// sendElsewhere sends a datagram from the slot to an address that is not the guest's.
	sendElsewhere := func() error {
		_, err := slotUDP.WriteTo([]byte("x"), &net.UDPAddr{IP: net.ParseIP(forgedAddress), Port: udpPort})
		return err
	}

	if got := arrive(); got != "" {
		t.Errorf("from the guest arrive: %s", got)
	}
	if err := sendElsewhere(); !errors.Is(err, syscall.EPERM) {
		t.Errorf("send to another address than the guest's: %v", err)
	}
	// Sources are checked also if a chain accepts everything.
	change := func(f func(*nftables.Conn, *nftables.Table)) {
		t.Helper()
		in(t, s, func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			f(c, &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName})
			return c.Flush()
		})
	}
	change(func(c *nftables.Conn, table *nftables.Table) {
		for _, name := range []string{"input", "output"} {
			c.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Table: table, Name: name}, Exprs: rule(expr.VerdictAccept)})
		}
	})
	if got := arrive(); got != "IPv4" {
		t.Errorf("if the rules accept all input, from the guest arrive: %s", got)
	}
	// Without the rules, all arrives: so the test would notice.
	change(func(c *nftables.Conn, table *nftables.Table) { c.DelTable(table) })
	if got := arrive(); got != "IPv4, forged, IPv6, outbound" {
		t.Errorf("without rules, from the guest arrive: %s", got)
	}
	if err := sendElsewhere(); err != nil {
		t.Errorf("without rules: %v", err)
	}
	startConnect(t, guest, hostIP, tcpPort)
	_ = tcp.SetDeadline(time.Now().Add(timeout))
	if c, err := tcp.Accept(); err != nil {
		t.Errorf("without rules, the guest cannot connect: %v", err)
	} else {
		c.Close()
	}
}
