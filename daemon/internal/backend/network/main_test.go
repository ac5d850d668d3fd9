package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	nfnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/sys/portalport"
	"github.com/msbd/msbd/daemon/internal/sys/process"
	"github.com/msbd/msbd/daemon/internal/sys/thread"
)

// timeout is the limit for what needs milliseconds.
const timeout = 30 * time.Second

// Names of child processes, which are this program.
const (
	wireName    = "network-test-wire"
	creatorName = "network-test-creator"
	limitedName = "network-test-limited"
	checkName   = "network-test-check"
)

func TestMain(m *testing.M) {
	switch os.Args[0] {
	case wireName:
		runWire()
	case creatorName:
		runCreator()
	case limitedName:
		runLimited()
	case checkName:
		runCheck()
	default:
		os.Exit(m.Run())
	}
}

// child returns the command that starts this program as the child process name. Its descriptors from 3 on are files.
func child(name string, args []string, files ...*os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args, cmd.ExtraFiles, cmd.Stderr = append([]string{name}, args...), files, os.Stderr
	return cmd
}

// Descriptors of a wire.
const slotFD, guestFD = 3, 4

// runWire copies frames between the two taps, as QEMU does between a tap and the network interface of its guest. It ends
// with the test, which holds the other end of its standard input.
func runWire() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	send := func(from, to int) {
		frame := make([]byte, 1<<17)
		for {
			n, err := unix.Read(from, frame)
			if err != nil {
				panic(err)
			}
			_, _ = unix.Write(to, frame[:n])
		}
	}
	go send(slotFD, guestFD)
	send(guestFD, slotFD)
}

// newSlot returns a slot, which is closed after the test if the test does not do so.
func newSlot(t *testing.T) *Slot {
	t.Helper()
	s, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// newGuest returns a stand-in for a guest: a namespace whose network interface, eth0, has the addresses of a guest's.
func newGuest(t *testing.T) *Slot {
	t.Helper()
	var g Slot
	err := thread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if g.tap, err = openTap("eth0"); err != nil {
			return err
		}
		if g.namespace, err = namespaceOf(int(g.tap.Fd())); err != nil {
			return err
		}
		handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer handle.Close()
		eth0, err := handle.LinkByName("eth0")
		if err != nil {
			return err
		}
		mac, err := net.ParseMAC(portalport.GuestMAC)
		if err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: guestIP, Mask: net.CIDRMask(portalport.GuestAddress.Bits(), 32)}}
		return errors.Join(handle.LinkSetHardwareAddr(eth0, mac), handle.AddrAdd(eth0, addr), handle.LinkSetUp(eth0),
			handle.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: hostIP}))
	})
	t.Cleanup(func() { _ = g.Close() })
	if err != nil {
		t.Fatal(err)
	}
	return &g
}

// startWire connects the slot to the guest until stop is called, or until the end of the test.
func startWire(t *testing.T, s, guest *Slot) (wire *process.Process, stop func()) {
	t.Helper()
	cmd := child(wireName, nil, s.Tap(), guest.Tap())
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	t.Cleanup(stop)
	return openProcess(t, cmd.Process.Pid), stop
}

func openProcess(t *testing.T, pid int) *process.Process {
	t.Helper()
	p, err := process.Open(pid)
	if err != nil || p == nil {
		t.Fatalf("open process %d: %v, %v", pid, p, err)
	}
	t.Cleanup(p.Close)
	return p
}

// in runs f in the namespace of s.
func in(t *testing.T, s *Slot, f func() error) {
	t.Helper()
	err := thread.Run(func() error {
		if err := s.enter(); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// serveEcho starts a server in the namespace of s, which sends back what it gets, and returns its port.
func serveEcho(t *testing.T, s *Slot) (port int) {
	t.Helper()
	var l net.Listener
	in(t, s, func() (err error) {
		l, err = net.Listen("tcp4", "0.0.0.0:0")
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

// dial connects to the port of the slot's guest until the end of the test.
func dial(t *testing.T, s *Slot, port int) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	conn, err := s.Dial(ctx, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// checkEcho sends text to a server that sends it back.
func checkEcho(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(timeout))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("got %q, %v, want %q", got, err, text)
	}
}

// observe returns a function that waits until the namespaces of all slots have ended. The kernel reports the end of a
// namespace to those in which it has a number.
func observe(t *testing.T, slots ...*Slot) (wait func()) {
	t.Helper()
	var reports *nfnetlink.Conn
	err := thread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		reports, err = nfnetlink.Dial(unix.NETLINK_ROUTE, &nfnetlink.Config{Groups: 1 << (unix.RTNLGRP_NSID - 1)})
		if err != nil {
			return err
		}
		handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer handle.Close()
		for i, s := range slots {
			if err := handle.SetNetNsIdByFd(int(s.namespace.Fd()), i+1); err != nil {
				return err
			}
		}
		return nil
	})
	if reports != nil {
		t.Cleanup(func() { reports.Close() })
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		_ = reports.SetReadDeadline(time.Now().Add(timeout))
		for ended := 0; ended < len(slots); {
			messages, err := reports.Receive()
			if err != nil {
				t.Fatalf("%d of %d namespaces have ended: %v", ended, len(slots), err)
			}
			for _, m := range messages {
				if m.Header.Type == unix.RTM_DELNSID {
					ended++
				}
			}
		}
	}
}

// runLimited calls New with ever more descriptors until it succeeds. It prints each error, and exits with an error if an
// error left a descriptor or a thread in a namespace.
func runLimited() {
	fatal := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	openFDs := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		fatal(err)
		return len(fds) - 1 // without that of the directory
	}
	var full unix.Rlimit
	fatal(unix.Getrlimit(unix.RLIMIT_NOFILE, &full))
	s, err := New() // opens what this process opens only once
	fatal(err)
	s.Close()
	before := openFDs()
	for limit := 3; ; limit++ {
		fatal(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(limit), Max: full.Max}))
		s, err := New()
		fatal(unix.Setrlimit(unix.RLIMIT_NOFILE, &full))
		if err == nil {
			s.Close()
			return
		}
		fmt.Println(err)
		if after := openFDs(); after != before {
			fatal(fmt.Errorf("%d descriptors are open, before it were %d: %w", after, before, err))
		}
		for deadline := time.Now().Add(timeout); strayThread(); runtime.Gosched() { // the thread of New ends a moment after it
			if time.Now().After(deadline) {
				fatal(fmt.Errorf("a thread stays in a namespace: %w", err))
			}
		}
	}
}

// strayThread reports whether a thread of this process is in another network namespace than its main thread.
func strayThread() bool {
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return true
	}
	threads, _ := os.ReadDir("/proc/self/task")
	return slices.ContainsFunc(threads, func(e os.DirEntry) bool {
		namespace, err := os.Readlink("/proc/self/task/" + e.Name() + "/ns/net")
		return err == nil && namespace != home
	})
}

// runCreator is an msbd that creates a slot, starts a wire between it and the guest with the tap 3, and ends. It prints the
// wire's pid.
func runCreator() {
	s, err := New()
	if err != nil {
		panic(err)
	}
	wire := child(wireName, nil, s.Tap(), os.NewFile(3, "eth0"))
	wire.Stdin = os.Stdin
	if err := wire.Start(); err != nil {
		panic(err)
	}
	fmt.Print(wire.Process.Pid)
}

// startCreator runs runCreator and returns the wire, which is killed at the end of the test.
func startCreator(t *testing.T, guest *Slot) *process.Process {
	t.Helper()
	in, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); end.Close() })
	creator := child(creatorName, nil, guest.Tap())
	creator.Stdin = in
	out, err := creator.Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	wire := openProcess(t, pid)
	t.Cleanup(func() {
		if err := wire.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return wire
}
