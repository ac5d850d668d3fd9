package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestDial(t *testing.T) {
	s, guest := newSlot(t), newGuest(t)
	port := serveEcho(t, guest)
	startWire(t, s, guest)
	conn := dial(t, s, port)
	checkEcho(t, conn, strings.Repeat("all of a long text", 100_000))
	if host, _, _ := net.SplitHostPort(conn.LocalAddr().String()); host != hostIP.String() {
		t.Errorf("its local address is %s, want %s", host, hostIP.String())
	}
	if want := fmt.Sprintf("%s:%d", guestIP.String(), port); conn.RemoteAddr().String() != want {
		t.Errorf("its remote address is %s, want %s", conn.RemoteAddr(), want)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		keepAlive, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
		idle, idleErr := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
		if err != nil || idleErr != nil || keepAlive == 0 || idle != 15 {
			t.Errorf("keep-alive %d after %d s; %v, %v", keepAlive, idle, err, idleErr)
		}
	})
	const closed = 1 // no program listens there
	if _, err := s.Dial(t.Context(), closed); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port without a listener: %v", err)
	}
	if _, err := s.Dial(t.Context(), 1<<16); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a number that is no port: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Dial(t.Context(), port); err == nil || !strings.Contains(err.Error(), "use of closed file") {
		t.Errorf("the slot is closed: %v", err)
	}
	checkEcho(t, conn, "a connection of a closed slot")
}

// A guest that does not answer does not keep Dial from ending. It gets the first packet of the connection without having
// been asked for its hardware address.
func TestDialEnds(t *testing.T) {
	s := newSlot(t) // without a wire
	ended := errors.New("the caller gave up")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(ended) })
	const port = 0x1234
	if _, err := s.Dial(ctx, port); !errors.Is(err, ended) {
		t.Errorf("the caller ended it while it waited: %v", err)
	}
	if _, err := s.Dial(ctx, port); !errors.Is(err, ended) {
		t.Errorf("the caller ended it before: %v", err)
	}
	// QEMU needs these flags, with which 10 bytes that describe the frame precede it.
	const flags, prefix = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR, 10
	request, err := unix.NewIfreq("")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlIfreq(int(s.Tap().Fd()), unix.TUNGETIFF, request); err != nil || request.Uint16() != flags {
		t.Fatalf("the flags of the tap are %#x, %v, want %#x", request.Uint16(), err, flags)
	}
	frame := make([]byte, 2000)
	n, err := s.Tap().Read(frame)
	want := []byte("\x02\x00\x00\x00\x00\x01" + "\x02\x00\x00\x00\x00\x02" + "\x08\x00" + "\x45") // to, from, IPv4
	if err != nil || n < prefix || !bytes.HasPrefix(frame[prefix:n], want) || !bytes.Contains(frame[:n], []byte("\x12\x34")) {
		t.Errorf("the first frame is %x, %v", frame[:n], err)
	}
}

// A slot lives as long as a process has its tap open, even if the one that created it has ended, and no longer.
func TestFind(t *testing.T) {
	guest := newGuest(t)
	port := serveEcho(t, guest)
	wire := startCreator(t, guest)
	s, err := Find(wire, slotFD)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	if s.Tap() != nil {
		t.Error("a slot that was found has a tap")
	}
	conn := dial(t, s, port)
	checkEcho(t, conn, "hello")
	// Without s, only the wire keeps the namespace.
	wait := observe(t, s)
	conn.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Find(wire, slotFD)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	open := dial(t, again, port)
	checkEcho(t, open, "hello again")
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	for _, fd := range []int{0, 1000} { // not a tap, and not open
		if _, err := Find(wire, fd); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("descriptor %d", fd)) {
			t.Errorf("Find by descriptor %d: %v", fd, err)
		}
	}
	if err := wire.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(wire, slotFD); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("Find by a process that has ended: %v", err)
	}
	open.Close() // the guest will never confirm that
	wait()
}

// Slots that are created at the same time are different ones, and nothing remains of them.
func TestManySlots(t *testing.T) {
	slots := make([]*Slot, 20)
	var creations sync.WaitGroup
	for i := range slots {
		creations.Go(func() {
			var err error
			if slots[i], err = New(); err != nil {
				t.Error(err)
			}
		})
	}
	creations.Wait()
	if t.Failed() {
		t.FailNow()
	}
	seen := map[uint64]bool{}
	for _, s := range slots {
		var st unix.Stat_t
		if err := unix.Fstat(int(s.namespace.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		seen[st.Ino] = true
	}
	if len(seen) != len(slots) {
		t.Errorf("%d slots have %d namespaces", len(slots), len(seen))
	}
	wait := observe(t, slots...)
	for _, s := range slots {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	wait()
}

// An error of New leaves neither a descriptor nor a thread that would keep a namespace.
func TestErrorsLeaveNothing(t *testing.T) {
	out, err := child(limitedName, nil).Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	steps := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(steps)
	if steps = slices.Compact(steps); len(steps) < 3 || strings.Count(string(out), "too many open files") < 3 {
		t.Errorf("New failed in %d steps, want several: %q", len(steps), steps)
	}
}

// runCheck prints the result of Check on a host that lacks what the argument names.
func runCheck() {
	var err error
	switch os.Args[1] {
	case "tun":
		err = errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("none", "/dev/net", "tmpfs", 0, ""))
	case "nf_tables":
		err = denyNetfilter()
	}
	if err != nil {
		panic(err)
	}
	err = Check()
	fmt.Println(errdefs.IsFailedPrecondition(err), err)
}

// denyNetfilter makes all threads of this process fail to open netfilter's sockets, as on a kernel without it.
func denyNetfilter() error {
	const number, protocol = 0, 16 + 2*8 // offsets in struct seccomp_data
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: protocol},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.NETLINK_NETFILTER, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&filter)))
	if errno != 0 {
		return errno
	}
	return nil
}

// The errors say what the host lacks and how to add it.
func TestCheck(t *testing.T) {
	if err := Check(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		lacks, want string
		attr        *syscall.SysProcAttr
	}{
		{"tun", "open /dev/net/tun: no such file or directory; load its module: modprobe tun", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}},
		{"nf_tables", "add rules with nf_tables: socket: protocol not supported; load the modules for rules: modprobe -a nf_tables nft_ct", nil},
		{"root", "operation not permitted; run msbd as root", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}},
	} {
		cmd := child(checkName, []string{tt.lacks})
		cmd.SysProcAttr = tt.attr
		out, err := cmd.Output()
		if err != nil || !bytes.HasPrefix(out, []byte("true ")) || !bytes.Contains(out, []byte(tt.want)) {
			t.Errorf("without %s: %s, %v, want ErrFailedPrecondition with %q", tt.lacks, out, err, tt.want)
		}
	}
}

// BenchmarkNew reports the median of the time that New takes alone, and of the time that 20 calls at once take together.
func BenchmarkNew(b *testing.B) {
	for _, together := range []int{1, 20} {
		b.Run(fmt.Sprintf("%d", together), func(b *testing.B) {
			var times []time.Duration
			for b.Loop() {
				slots := make([]*Slot, together)
				var creations sync.WaitGroup
				start := time.Now()
				for i := range slots {
					creations.Go(func() {
						var err error
						if slots[i], err = New(); err != nil {
							b.Error(err)
						}
					})
				}
				creations.Wait()
				times = append(times, time.Since(start))
				b.StopTimer()
				for _, s := range slots {
					if s != nil {
						s.Close()
					}
				}
				b.StartTimer()
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "ms-p50")
			b.ReportMetric(float64(times[len(times)-1].Microseconds())/1000, "ms-max")
		})
	}
}
