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

// testConcurrentCalls makes concurrent calls: many of the same kind, and calls on a container while it is removed.
func testConcurrentCalls(t *testing.T, c *conformance) {
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

// inParallel calls f n times concurrently and waits until all calls have returned.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// testManyExecs starts many execs with different ids, and many with the same id.
func testManyExecs(t *testing.T, c *conformance) {
	inParallel(50, func(i int) {
		exec := fmt.Sprint("many", i)
		want := result{strings.Repeat("out", i), strings.Repeat("err", i), int32(i)}
		_, err := c.ExecProcess(t.Context(), &pb.ExecProcessRequest{
			ContainerId: containerID, ExecId: exec, Process: tool("streams", want.stdout, want.stderr, fmt.Sprint(i)),
		})
		if err != nil {
			t.Errorf("%s: %v", exec, err)
			return
		}
		if r, err := c.collect(t.Context(), containerID, exec); err != nil || r != want {
			t.Errorf("%s: %v, %v; want %v", exec, r, err, want)
		}
	})
	// Only one of several execs with the same id succeeds.
	var mu sync.Mutex
	got := make(map[codes.Code]int)
	inParallel(10, func(int) {
		_, err := c.ExecProcess(t.Context(), &pb.ExecProcessRequest{ContainerId: containerID, ExecId: "one", Process: tool("self")})
		mu.Lock()
		defer mu.Unlock()
		got[status.Code(err)]++
	})
	if got[codes.OK] != 1 || got[codes.AlreadyExists] != 9 {
		t.Errorf("10 execs with the same id: status codes %v, want 1 OK and 9 AlreadyExists", got)
	}
	c.finish(t, containerID, "one")
}

// testManySignals sends many signals to a process that exits at one of them.
func testManySignals(t *testing.T, c *conformance) {
	c.exec(t, containerID, "target", tool("wait"))
	c.expect(t, "target", "waiting\n")
	// The process exits at SIGUSR1. A signal that comes later is not an error.
	inParallel(100, func(i int) {
		sig := []unix.Signal{unix.SIGCONT, unix.SIGURG, unix.SIGUSR1, unix.SIGWINCH}[i%4]
		if _, err := c.SignalProcess(t.Context(), &pb.SignalProcessRequest{ContainerId: containerID, ExecId: "target", Signal: uint32(sig)}); err != nil {
			t.Errorf("send %v: %v", sig, err)
		}
	})
	if r := c.finish(t, containerID, "target"); r.status != 7 {
		t.Error(r)
	}
}

// testSlowReader reads an endless stream in small pieces and checks that other requests are served meanwhile. Then it
// reads a long stream completely.
func testSlowReader(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, containerID, "flood", conformanceTool("flood"))
	got := ""
	for len(got) < 5000 {
		resp, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: containerID, ExecId: "flood", Len: 61})
		if err != nil {
			t.Fatal(err)
		}
		got += string(resp.Data)
		if _, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if i := strings.IndexByte(got, '\n'); i != 4095 {
		t.Errorf("the first line ends at byte %d, want 4095", i)
	}
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: "flood", Signal: uint32(unix.SIGKILL)}))
	if r := c.finish(t, containerID, "flood"); r.status != 128+9 || strings.Trim(r.stdout, "x\n") != "" {
		t.Errorf("flood: status %d, %d bytes of output; want status %d", r.status, len(r.stdout), 128+9)
	}
	const size = 6 << 20
	if r := c.run(t, containerID, "big", tool("print", fmt.Sprint(size))); len(r.stdout) != size {
		t.Errorf("printed %d bytes, want %d", len(r.stdout), size)
	}
}

// testAbandonedCalls lets calls that wait time out. They must not take output that arrives later.
func testAbandonedCalls(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, containerID, "quiet", tool("copy"))
	short := context.WithValue(ctx, serverTimeoutKey{}, shortTimeout)
	inParallel(20, func(i int) {
		var err error
		switch i % 3 {
		case 0:
			_, err = c.ReadStdout(short, &pb.ReadStreamRequest{ContainerId: containerID, ExecId: "quiet", Len: 100})
		case 1:
			_, err = c.WaitProcess(short, &pb.WaitProcessRequest{ContainerId: containerID, ExecId: "quiet"})
		case 2:
			_, err = c.GetOOMEvent(short, &pb.GetOOMEventRequest{})
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("call that waits in vain: %v, want status code DeadlineExceeded", err)
		}
	})
	ok(t)(c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "quiet", Data: []byte("kept")}))
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: containerID, ExecId: "quiet"}))
	if r := c.finish(t, containerID, "quiet"); r != (result{"kept", "", 0}) {
		t.Error(r)
	}
}

// testWriters makes concurrent writes to the same input. Each must arrive completely. A write that times out must not end
// another one.
func testWriters(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.exec(t, containerID, "shared", conformanceTool("sink"))
	const writers, size = 8, 100_000
	inParallel(writers, func(i int) {
		resp, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "shared", Data: make([]byte, size)})
		if err != nil || resp.Len != size {
			t.Errorf("write: %v, %v; want length %d", resp, err, size)
		}
	})
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: containerID, ExecId: "shared"}))
	if r := c.finish(t, containerID, "shared"); r.stdout != fmt.Sprintln(writers*size) {
		t.Errorf("%d writes of %d bytes: %v, want stdout %d", writers, size, r, writers*size)
	}

	// A stopped process does not read.
	c.exec(t, containerID, "stopped", conformanceTool("sink"))
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: "stopped", Signal: uint32(unix.SIGSTOP)}))
	done := make(chan error)
	go func() {
		_, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "stopped", Data: make([]byte, 1<<20)})
		done <- err
	}()
	// By the time of this response, the first write has most likely acquired the writers' lock.
	if _, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil {
		t.Error(err)
	}
	short := context.WithValue(ctx, serverTimeoutKey{}, shortTimeout)
	_, err := c.WriteStdin(short, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "stopped", Data: make([]byte, 1<<20)})
	wantCode(t, err, codes.DeadlineExceeded)
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: "stopped", Signal: uint32(unix.SIGCONT)}))
	if err := <-done; err != nil {
		t.Errorf("the write that kept waiting: %v", err)
	}
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: containerID, ExecId: "stopped"}))
	c.finish(t, containerID, "stopped")
}

// testRemovalRaces removes a container while calls of all kinds on it are in progress. Each call must return, either with
// its normal result or with an error that says that the container is gone.
func testRemovalRaces(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	for i := range 4 { // unread output must not block the removal
		c.exec(t, containerID, fmt.Sprint("unread", i), conformanceTool("flood"))
	}
	gone := []codes.Code{codes.OK, codes.NotFound, codes.FailedPrecondition, codes.OutOfRange}
	calls := []func(i int) error{
		func(int) error {
			resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: containerID})
			if err == nil && resp.Status != 128+9 {
				return fmt.Errorf("status %d", resp.Status)
			}
			return err
		},
		func(int) error {
			_, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: containerID, ExecId: sinkExec, Len: 100})
			return err
		},
		func(i int) error {
			exec := fmt.Sprint("late", i)
			_, err := c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: containerID, ExecId: exec, Process: tool("wait")})
			if err == nil {
				_, err = c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: containerID, ExecId: exec})
			}
			return err
		},
		func(int) error {
			_, err := c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, Signal: uint32(unix.SIGCONT)})
			return err
		},
		func(int) error {
			_, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: containerID, Data: make([]byte, 100_000)})
			return err
		},
		func(int) error {
			_, err := c.StatsContainer(ctx, &pb.StatsContainerRequest{ContainerId: containerID})
			return err
		},
		func(int) error {
			_, err := c.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: containerID, ExecId: ttyExec, Row: 1, Column: 1})
			return err
		},
		func(i int) error {
			if i < 40 {
				return nil // remove the container only after other calls have started
			}
			_, err := c.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: containerID})
			return err
		},
	}
	inParallel(8*len(calls), func(i int) {
		if err := calls[i%len(calls)](i); !slices.Contains(gone, status.Code(err)) {
			t.Errorf("call %d on a container that is being removed: %v", i%len(calls), err)
		}
	})
	if ctx.Err() != nil {
		t.Error("a call did not return when the container was removed")
	}
	_, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: containerID})
	wantCode(t, err, codes.NotFound)
}

// testCreationRaces concurrently creates, starts and removes containers with a few ids, and removes those that are left.
func testCreationRaces(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), 4*callTimeout)
	defer cancel()
	expected := []codes.Code{codes.OK, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition}
	inParallel(8, func(i int) {
		id := fmt.Sprint("racer", i%3)
		for range 2 {
			_, createErr := c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: buildSpec(containerID)})
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

// collect is like finish but returns errors, so that goroutines other than the test's can use it.
func (c *conformance) collect(ctx context.Context, cid, exec string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
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
