// Package control serves the host's requests on the control port, such as those to correct the guest's clock. Its
// protocol is that of package sys/control.
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
	"github.com/msbd/msbd/daemon/internal/sys/control"
)

// maxSlew is the largest difference that is corrected gradually, so that time does not go backwards. The kernel corrects
// 0.5 ms per second, so it has finished before the host's next check.
const maxSlew = 5 * time.Millisecond

// Serve serves the control port. It returns if the machine has none.
func Serve(log *slog.Logger) {
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
		serve(conn, log)
	}
}

// serve serves one connection of the host.
func serve(conn net.Conn, log *slog.Logger) {
	defer conn.Close()
	if err := control.Serve(conn, handle); err != nil {
		log.Warn("a connection to the control port ended", "err", err)
	}
}

// handle does what a request asks for.
func handle(req control.Request) (resp control.Response) {
	if req.Adjust != 0 {
		c := correction(time.Duration(req.Adjust))
		if _, err := unix.Adjtimex(&c); err != nil {
			resp.Error = fmt.Sprintf("correct the clock: %v", err)
		}
	}
	resp.Time = time.Now().UnixNano()
	return resp
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
