// Package control serves the host's requests on the control port. It corrects the guest's clock itself, and passes the other
// requests to the agent. Its protocol is that of package sys/control.
//
// Without corrections, the guest's clock is up to one second wrong, because the real-time clock from which the kernel sets
// it at boot has a resolution of one second. It would also stay behind by the time for which the guest's machine was
// stopped.
package control

import (
	"fmt"
	"log/slog"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/daemon/internal/guest/agent/channel"
	"github.com/msbd/msbd/daemon/internal/guest/agent/refusal"
	"github.com/msbd/msbd/daemon/internal/sys/control"
)

// maxSlew is the largest difference that is corrected gradually, so that time does not go backwards. The kernel corrects
// 0.5 ms per second, so it has finished before the host's next check.
const maxSlew = 5 * time.Millisecond

// Guest is what the requests change, other than the clock. Its methods are called one at a time. Their errors must not have
// the token.
type Guest interface {
	// Reseed adds seed to the kernel's random number generator and reseeds that.
	Reseed(seed []byte) error
	// SetToken sets the token of the connections to the portal.
	SetToken(token string) error
	// SetHostname sets the hostname of the container.
	SetHostname(name string) error
	// AwaitPortal waits for up to timeout until the portal is ready, and reports whether it is.
	AwaitPortal(timeout time.Duration) (bool, error)
}

// Serve serves the control port. It returns if the machine has none.
func Serve(log *slog.Logger, guest Guest) {
	l, err := channel.ListenPort(control.PortName)
	if err != nil {
		log.Info("the host does not correct the clock", "err", err)
		return
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			log.Error("the control port failed", "err", err)
			return
		}
		serve(conn, log, guest)
	}
}

// serve serves one connection of the host.
func serve(conn net.Conn, log *slog.Logger, guest Guest) {
	defer conn.Close()
	err := control.Serve(conn, func(req control.Request) control.Response { return handle(req, guest) })
	if err != nil {
		log.Warn("a connection to the control port ended", "err", err)
	}
}

// handle does what a request asks for. If something fails, it does not do what comes after that.
func handle(req control.Request, guest Guest) (resp control.Response) {
	if err := change(req, guest, &resp); err != nil {
		resp.Error = refusal.Text(err)
	}
	resp.Time = time.Now().UnixNano()
	return resp
}

func change(req control.Request, guest Guest, resp *control.Response) (err error) {
	if req.Adjust != 0 {
		c := correction(time.Duration(req.Adjust))
		if _, err := unix.Adjtimex(&c); err != nil {
			return fmt.Errorf("correct the clock: %w", err)
		}
	}
	if len(req.Seed) > 0 {
		if err := guest.Reseed(req.Seed); err != nil {
			return fmt.Errorf("seed the random number generator: %w", err)
		}
	}
	if req.Token != "" {
		if err := guest.SetToken(req.Token); err != nil {
			return fmt.Errorf("set the token: %w", err)
		}
	}
	if req.Hostname != "" {
		if err := guest.SetHostname(req.Hostname); err != nil {
			return err
		}
	}
	if req.AwaitPortal {
		resp.Ready, err = guest.AwaitPortal(control.PortalWait)
	}
	return err
}

// correction returns the request to the kernel that moves the clock forward by offset. Small offsets are corrected
// gradually.
func correction(offset time.Duration) unix.Timex {
	if offset.Abs() <= maxSlew {
		return unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: offset.Microseconds()}
	}
	sec, nsec := int64(offset/time.Second), int64(offset%time.Second)
	if nsec < 0 { // the kernel requires that the nanoseconds are not negative
		sec, nsec = sec-1, nsec+int64(time.Second)
	}
	return unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: sec, Usec: nsec}}
}
