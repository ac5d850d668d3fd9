package agent

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"

	"github.com/msbd/msbd/daemon/internal/sys/control"
)

// maxClockError is how far the guest's clock may be from the host's.
const maxClockError = 5 * time.Millisecond

// testClock corrects the clock as msbd does before a container starts.
func testClock(t *testing.T, g *guest, id string) {
	g.syncClock(t)
	clock := g.startClock(t, id, "clock1")
	if err := clock.compare(t); err != nil {
		t.Error(err)
	}
	clock.stop(t)
}

// testWrongClock makes the clock wrong in both directions and corrects it.
func testWrongClock(t *testing.T, g *guest, id string) {
	clock := g.startClock(t, id, "clock2")
	for _, ahead := range []time.Duration{3 * time.Second, -3 * time.Second} {
		wrong := time.Now().Add(ahead)
		ok(t)(g.SetGuestDateTime(t.Context(), &pb.SetGuestDateTimeRequest{Sec: wrong.Unix(), Usec: int64(wrong.Nanosecond() / 1000)}))
		if err := clock.compare(t); err == nil {
			t.Errorf("the guest's clock is right after it was set wrong by %v", ahead)
		}
		g.syncClock(t)
		if err := clock.compare(t); err != nil {
			t.Error(err)
		}
	}
	clock.stop(t)
}

// syncClock corrects the guest's clock over a new connection to the control port.
func (g *guest) syncClock(t *testing.T) {
	t.Helper()
	c, err := control.Dial(t.Context(), g.control)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SyncClock(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// guestClock is a process in a container that tells the time.
type guestClock struct {
	g         *guest
	cid, exec string
}

func (g *guest) startClock(t *testing.T, cid, exec string) *guestClock {
	t.Helper()
	g.exec(t, cid, exec, tool("clock"))
	return &guestClock{g, cid, exec}
}

// stop ends the process.
func (c *guestClock) stop(t *testing.T) {
	t.Helper()
	ok(t)(c.g.CloseStdin(t.Context(), &pb.CloseStdinRequest{ContainerId: c.cid, ExecId: c.exec}))
	if r := c.g.finish(t, c.cid, c.exec); r.status != 0 {
		t.Errorf("the process that tells the time: %v", r)
	}
}

// clockReading is the guest's time at some point between two times of the host.
type clockReading struct {
	before, guest, after time.Time
}

func (c *guestClock) ask(t *testing.T) clockReading {
	t.Helper()
	r := clockReading{before: time.Now()}
	ok(t)(c.g.WriteStdin(t.Context(), &pb.WriteStreamRequest{ContainerId: c.cid, ExecId: c.exec, Data: []byte("\n")}))
	resp, err := c.g.ReadStdout(t.Context(), &pb.ReadStreamRequest{ContainerId: c.cid, ExecId: c.exec, Len: 64})
	if err != nil {
		t.Fatalf("read the guest's time: %v", err)
	}
	r.after = time.Now()
	ns, err := strconv.ParseInt(strings.TrimSpace(string(resp.Data)), 10, 64)
	if err != nil {
		t.Fatalf("read the guest's time: %v", err)
	}
	r.guest = time.Unix(0, ns)
	return r
}

// compare returns an error if the guest's clock differs from the host's by more than maxClockError. It asks several
// times and uses the fastest reading. A slow one says little about the clock.
func (c *guestClock) compare(t *testing.T) error {
	t.Helper()
	best := c.ask(t)
	for range 20 {
		if r := c.ask(t); r.after.Sub(r.before) < best.after.Sub(best.before) {
			best = r
		}
	}
	fromBefore, fromAfter := best.guest.Sub(best.before), best.guest.Sub(best.after)
	if fromBefore < -maxClockError || fromAfter > maxClockError {
		return fmt.Errorf("the guest's clock is between %v and %v ahead of the host's, want at most %v difference", fromAfter, fromBefore, maxClockError)
	}
	t.Logf("the guest's clock is between %v and %v ahead of the host's", fromAfter, fromBefore)
	return nil
}
