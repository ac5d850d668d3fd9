package agent

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// testAtOnce makes calls that meet: many of one kind, and such as take each other's object away.
func testAtOnce(t *testing.T, c *conformance) {
	rounds := 1
	if os.Getenv("MSB_SOAK") == "1" {
		rounds = 50
	}
	for range rounds {
		c.startFixture(t)
		t.Run("execs", func(t *testing.T) { testManyExecs(t, c) })
		t.Run("signals", func(t *testing.T) { testManySignals(t, c) })
		t.Run("slow reader", func(t *testing.T) { testSlowReader(t, c) })
		t.Run("abandoned calls", func(t *testing.T) { testAbandonedCalls(t, c) })
		t.Run("writers", func(t *testing.T) { testWriters(t, c) })
		t.Run("removal", func(t *testing.T) { testRemovalRaces(t, c) })
		t.Run("creation", func(t *testing.T) { testCreationRaces(t, c) })
	}
}

// atOnce runs n functions together and waits for all.
func atOnce(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

func testManyExecs(t *testing.T, c *conformance) {
	atOnce(50, func(i int) {
		exec := fmt.Sprint("many", i)
		want := result{strings.Repeat("out", i), strings.Repeat("err", i), int32(i)}
		_, err := c.ExecProcess(t.Context(), &pb.ExecProcessRequest{
			ContainerId: boxID, ExecId: exec, Process: tool("streams", want.stdout, want.stderr, fmt.Sprint(i)),
		})
		if err != nil {
			t.Errorf("%s: %v", exec, err)
			return
		}
		if r, err := c.collect(t.Context(), boxID, exec); err != nil || r != want {
			t.Errorf("%s: got %v, %v, want %v", exec, r, err, want)
		}
	})
	// One id for many: one of them gets it.
	var mu sync.Mutex
	got := make(map[codes.Code]int)
	atOnce(10, func(int) {
		_, err := c.ExecProcess(t.Context(), &pb.ExecProcessRequest{ContainerId: boxID, ExecId: "one", Process: tool("self")})
		mu.Lock()
		defer mu.Unlock()
		got[status.Code(err)]++
	})
	if got[codes.OK] != 1 || got[codes.AlreadyExists] != 9 {
		t.Errorf("10 execs with one id: %v", got)
	}
	c.finish(t, boxID, "one")
}

func testManySignals(t *testing.T, c *conformance) {
	c.exec(t, boxID, "target", tool("wait"))
	c.expect(t, "target", "waiting\n")
	// It ends at one of them; the others come too late, and that is no error.
	atOnce(100, func(i int) {
		sig := []unix.Signal{unix.SIGCONT, unix.SIGURG, unix.SIGUSR1, unix.SIGWINCH}[i%4]
		if _, err := c.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: boxID, ExecId: "target", Signal: uint32(sig)}); err != nil {
			t.Errorf("%v: %v", sig, err)
		}
	})
	if r := c.finish(t, boxID, "target"); r.status != 7 {
		t.Error(r)
	}
}

// testSlowReader reads a stream without end in small pieces, while others get their answers; then all
// of a long one.
func testSlowReader(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, boxID, "flood", own("flood"))
	got := ""
	for len(got) < 5000 {
		resp, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: boxID, ExecId: "flood", Len: 61})
		if err != nil {
			t.Fatal(err)
		}
		got += string(resp.Data)
		if _, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if i := strings.IndexByte(got, '\n'); i != 4095 {
		t.Errorf("the first line ends at %d", i)
	}
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, ExecId: "flood", Signal: uint32(unix.SIGKILL)}))
	if r := c.finish(t, boxID, "flood"); r.status != 128+9 || strings.Trim(r.stdout, "x\n") != "" {
		t.Errorf("flood: status %d", r.status)
	}
	const size = 6 << 20
	if r := c.run(t, boxID, "big", tool("print", fmt.Sprint(size))); len(r.stdout) != size {
		t.Errorf("%d of %d bytes", len(r.stdout), size)
	}
}

// testAbandonedCalls gives up calls that wait. What comes later is not theirs.
func testAbandonedCalls(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, boxID, "quiet", tool("copy"))
	short := context.WithValue(ctx, serverLimit{}, waitLimit)
	atOnce(20, func(i int) {
		var err error
		switch i % 3 {
		case 0:
			_, err = c.ReadStdout(short, &pb.ReadStreamRequest{ContainerId: boxID, ExecId: "quiet", Len: 100})
		case 1:
			_, err = c.WaitProcess(short, &pb.WaitProcessRequest{ContainerId: boxID, ExecId: "quiet"})
		case 2:
			_, err = c.GetOOMEvent(short, &pb.GetOOMEventRequest{})
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a call of which nothing comes: %v", err)
		}
	})
	ok(t)(c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "quiet", Data: []byte("kept")}))
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: boxID, ExecId: "quiet"}))
	if r := c.finish(t, boxID, "quiet"); r != (result{"kept", "", 0}) {
		t.Error(r)
	}
}

// testWriters writes to one input from many sides: each piece arrives whole. A writer that gives up
// takes no other with it.
func testWriters(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, boxID, "shared", own("sink"))
	const writers, size = 8, 100_000
	atOnce(writers, func(i int) {
		resp, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "shared", Data: make([]byte, size)})
		if err != nil || resp.Len != size {
			t.Errorf("write: %v, %v", resp, err)
		}
	})
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: boxID, ExecId: "shared"}))
	if r := c.finish(t, boxID, "shared"); r.stdout != fmt.Sprintln(writers*size) {
		t.Errorf("%d writers of %d bytes: %v", writers, size, r)
	}

	// The process reads nothing while it is stopped.
	c.exec(t, boxID, "stopped", own("sink"))
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, ExecId: "stopped", Signal: uint32(unix.SIGSTOP)}))
	done := make(chan error)
	go func() {
		_, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "stopped", Data: make([]byte, 1<<20)})
		done <- err
	}()
	// Once this is answered, that writer has its turn.
	if _, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil {
		t.Error(err)
	}
	short := context.WithValue(ctx, serverLimit{}, waitLimit)
	_, err := c.WriteStdin(short, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "stopped", Data: make([]byte, 1<<20)})
	wantCode(t, err, codes.DeadlineExceeded)
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, ExecId: "stopped", Signal: uint32(unix.SIGCONT)}))
	if err := <-done; err != nil {
		t.Errorf("the writer that waited on: %v", err)
	}
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: boxID, ExecId: "stopped"}))
	c.finish(t, boxID, "stopped")
}

// testRemovalRaces removes the box while everything about it is under way: each call ends, with the
// box's own end or with the news that it is gone.
func testRemovalRaces(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	for i := range 4 { // what nobody has read goes with the box
		c.exec(t, boxID, fmt.Sprint("unread", i), own("flood"))
	}
	gone := []codes.Code{codes.OK, codes.NotFound, codes.FailedPrecondition, codes.OutOfRange}
	calls := []func(i int) error{
		func(int) error {
			resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: boxID})
			if err == nil && resp.Status != 128+9 {
				return fmt.Errorf("status %d", resp.Status)
			}
			return err
		},
		func(int) error {
			_, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: boxID, ExecId: sinkExec, Len: 100})
			return err
		},
		func(i int) error {
			exec := fmt.Sprint("late", i)
			_, err := c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: boxID, ExecId: exec, Process: tool("wait")})
			if err == nil {
				_, err = c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: boxID, ExecId: exec})
			}
			return err
		},
		func(int) error {
			_, err := c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, Signal: uint32(unix.SIGCONT)})
			return err
		},
		func(int) error {
			_, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: boxID, Data: make([]byte, 100_000)})
			return err
		},
		func(int) error {
			_, err := c.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: boxID})
			return err
		},
		func(int) error {
			_, err := c.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: boxID, ExecId: ttyExec, Row: 1, Column: 1})
			return err
		},
		func(i int) error {
			if i < 40 {
				return nil // first the others get going
			}
			_, err := c.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: boxID})
			return err
		},
	}
	atOnce(8*len(calls), func(i int) {
		if err := calls[i%len(calls)](i); !slices.Contains(gone, status.Code(err)) {
			t.Errorf("call %d of a box that goes: %v", i%len(calls), err)
		}
	})
	if ctx.Err() != nil {
		t.Error("a call did not end with the box")
	}
	_, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: boxID})
	wantCode(t, err, codes.NotFound)
}

// testCreationRaces makes and removes containers with few names from many sides. In the end there is
// none.
func testCreationRaces(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*callLimit)
	defer cancel()
	expected := []codes.Code{codes.OK, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition}
	atOnce(8, func(i int) {
		id := fmt.Sprint("racer", i%3)
		for range 2 {
			_, createErr := c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: buildSpec(boxID)})
			_, startErr := c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id})
			_, removeErr := c.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id})
			for _, err := range []error{createErr, startErr, removeErr} {
				if !slices.Contains(expected, status.Code(err)) {
					t.Error(err)
				}
			}
		}
	})
	for i := range 3 {
		_, _ = c.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: fmt.Sprint("racer", i)})
	}
}

// collect is finish for goroutines, which must not end the test.
func (c *conformance) collect(ctx context.Context, cid, exec string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*callLimit)
	defer cancel()
	stderr := make(chan string)
	go func() { stderr <- c.read(ctx, c.ReadStderr, cid, exec) }()
	var r result
	r.stdout = c.read(ctx, c.ReadStdout, cid, exec)
	r.stderr = <-stderr
	resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: cid, ExecId: exec})
	r.status = resp.GetStatus()
	return r, err
}
