package agent

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
)

// maxClockError is how far the guest's clock may be from the host's.
const maxClockError = 5 * time.Millisecond

// testClock checks the clock that the agent has set before the container started. Then it makes the clock wrong, for
// testClockCorrected.
func testClock(t *testing.T, g *guest, id string) {
	clock := g.startClock(t, id, "clock1")
	if err := clock.compare(t); err != nil {
		t.Error(err)
	}
	wrong := time.Now().Add(time.Hour)
	ok(t)(g.SetGuestDateTime(t.Context(), &pb.SetGuestDateTimeRequest{Sec: wrong.Unix(), Usec: int64(wrong.Nanosecond() / 1000)}))
	// The first reading may come after a correction by the agent. The second one may not, because of its interval.
	if first, second := clock.ask(t), clock.ask(t); first.guest.Before(wrong) && second.guest.Before(wrong) {
		t.Errorf("the guest's time is %v, want %v or a little later", second.guest, wrong)
	}
	clock.stop(t)

	hidden := filepath.Join(g.share, id, "rootfs", ".*")
	if files, err := filepath.Glob(hidden); err != nil || len(files) != 1 || filepath.Base(files[0]) != ".msb" {
		t.Errorf("the container's root has the hidden files %v, %v; want only .msb", files, err)
	}
}

// testClockCorrected waits until the agent has corrected the clock. The agent checks it every 30 seconds.
func testClockCorrected(t *testing.T, g *guest, id string) {
	clock := g.startClock(t, id, "clock2")
	waitFor(t, "the guest's clock to agree with the host's", func() error { return clock.compare(t) })
	clock.stop(t)
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
