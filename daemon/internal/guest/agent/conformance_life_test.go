package agent

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// testLife makes all calls in the order of a shim: a sandbox with its first container, another
// container in it, and programs in both. The first container stays.
func testLife(t *testing.T, c *conformance) {
	ctx := t.Context()
	good := goodRequests()
	send := func(names ...string) {
		t.Helper()
		for _, m := range rpcMethods() {
			if slices.Contains(names, m.name) {
				ok(t)(nil, c.call(t, m, good[m.name]))
			}
		}
	}
	// The connection, and what it leads to.
	if resp, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil || resp.Status != pb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", resp, err)
	}
	if resp, err := c.health.Version(ctx, &pb.CheckRequest{}); err != nil || resp.AgentVersion == "" || resp.GrpcVersion == "" {
		t.Errorf("version: %v, %v", resp, err)
	}
	details, err := c.GetGuestDetails(ctx, &pb.GuestDetailsRequest{MemBlockSize: true, MemHotplugProbe: true})
	if err != nil || details.AgentDetails == nil || details.SupportMemHotplugProbe {
		t.Errorf("details: %v, %v", details, err)
	}
	for _, driver := range []string{"virtio-fs", "ephemeral", "overlayfs", "blk"} {
		if !slices.Contains(details.GetAgentDetails().GetStorageHandlers(), driver) {
			t.Errorf("no storage driver %s: %v", driver, details)
		}
	}

	// The sandbox. A restored guest gets a seed and the time first.
	send("ReseedRandomDev", "UpdateInterface")
	now := time.Now()
	ok(t)(c.SetGuestDateTime(ctx, &pb.SetGuestDateTimeRequest{Sec: now.Unix(), Usec: int64(now.Nanosecond() / 1000)}))
	send("UpdateRoutes")
	send("AddARPNeighbors")
	send("CreateSandbox")
	if resp, err := c.ListInterfaces(ctx, &pb.ListInterfacesRequest{}); err != nil || !strings.Contains(resp.String(), "10.9.0.2") {
		t.Errorf("interfaces: %v, %v", resp, err)
	}
	if resp, err := c.ListRoutes(ctx, &pb.ListRoutesRequest{}); err != nil || !strings.Contains(resp.String(), "10.9.0.1") {
		t.Errorf("routes: %v, %v", resp, err)
	}
	stats, err := c.GetVolumeStats(ctx, &pb.VolumeStatsRequest{VolumeGuestPath: volumePoint})
	if err != nil || stats.Usage[0].Total == 0 || stats.Usage[0].Total > volumeSize {
		t.Errorf("volume: %v, %v", stats, err)
	}

	// Its first container.
	send("CopyFile")
	ok(t)(c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: watchID, ExecId: watchID, OCI: watchSpec()}))
	ok(t)(c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: watchID}))
	c.first = c.look(t)
	if n := len(c.first.Processes); n != 2 {
		t.Errorf("processes %q: want PID 1 and the container's", c.first.Processes)
	}

	// A container beside it.
	ok(t)(c.CreateContainer(ctx, good["CreateContainer"].(*pb.CreateContainerRequest)))
	send("UpdateContainer")
	send("RemoveContainer") // it was never started
	c.createBox(t, boxID, buildSpec(boxID))
	send("StartContainer")
	send("StatsContainer")
	testExecs(t, c)
	send("PauseContainer")
	send("ResumeContainer")
	testOOMEvent(t, c)
	if resp, err := c.GetMetrics(ctx, &pb.GetMetricsRequest{}); err != nil || !strings.Contains(resp.Metrics, "kata_guest_meminfo{item=") {
		t.Errorf("metrics: %v, %v", resp, err)
	}
	for _, m := range rpcMethods() {
		if slices.Contains(unsupported, m.name) {
			wantCode(t, c.call(t, m, good[m.name]), codes.Unimplemented)
		}
	}

	// Its end: the shim waits twice, and what was said before the end is not lost.
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, ExecId: boxID, Signal: uint32(unix.SIGUSR1)}))
	for range 2 {
		if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: boxID, ExecId: boxID}); err != nil || resp.Status != 7 {
			t.Errorf("wait: %v, %v", resp, err)
		}
	}
	if r := c.finish(t, boxID, boxID); r != (result{"waiting\ngot user defined signal 1\n", "", 7}) {
		t.Errorf("main process: %v", r)
	}
	send("RemoveStaleVirtiofsShareMounts")
	c.remove(t, boxID)
}

// testExecs runs programs in the box, each in its way.
func testExecs(t *testing.T, c *conformance) {
	ctx := t.Context()
	if r := c.run(t, boxID, "e1", tool("streams", "out", "err", "3")); r != (result{"out", "err", 3}) {
		t.Error(r)
	}
	if r := c.run(t, boxID, "e2", tool("streams", "", "", "255")); r != (result{"", "", 255}) {
		t.Error(r)
	}
	for range 2 {
		if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: boxID, ExecId: "e1"}); err != nil || resp.Status != 3 {
			t.Errorf("wait again: %v, %v", resp, err)
		}
	}

	c.exec(t, boxID, "e3", tool("copy"))
	if resp, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "e3", Data: []byte("through")}); err != nil || resp.Len != 7 {
		t.Errorf("write: %v, %v", resp, err)
	}
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: boxID, ExecId: "e3"}))
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: boxID, ExecId: "e3"}))
	if r := c.finish(t, boxID, "e3"); r != (result{"through", "", 0}) {
		t.Error(r)
	}

	p := tool("tty")
	p.Terminal, p.ConsoleSize = true, &pb.Box{Height: 30, Width: 100}
	c.exec(t, boxID, "e4", p)
	c.expect(t, "e4", "size 30x100")
	ok(t)(c.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: boxID, ExecId: "e4", Row: 40, Column: 120}))
	ok(t)(c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: boxID, ExecId: "e4", Data: []byte("hello\n")}))
	c.expect(t, "e4", "size 40x120")
	if r := c.finish(t, boxID, "e4"); r.status != 0 || r.stderr != "" {
		t.Error(r)
	}

	for sig, want := range map[unix.Signal]int32{unix.SIGUSR1: 7, unix.SIGTERM: 128 + 15, unix.SIGKILL: 128 + 9} {
		exec := c.nextExec()
		c.exec(t, boxID, exec, tool("wait"))
		c.expect(t, exec, "waiting\n")
		ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, ExecId: exec, Signal: uint32(sig)}))
		if r := c.finish(t, boxID, exec); r.status != want {
			t.Errorf("after %v: %v, want status %d", sig, r, want)
		}
	}
}

// expect reads of a process in the box until it has said what it should.
func (c *conformance) expect(t *testing.T, exec, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	for got := ""; !strings.Contains(got, want); {
		resp, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: boxID, ExecId: exec, Len: 1000})
		if err != nil {
			t.Fatalf("%s said %q, not %q: %v", exec, got, want, err)
		}
		got += string(resp.Data)
	}
}

// testOOMEvent waits for an event before there is one, as the shim does.
func testOOMEvent(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	spec := buildSpec(boxID)
	spec.Linux.Resources.Memory.Limit = 24 << 20
	spec.Process = tool("eat", "32")
	c.createBox(t, "glutton", spec)
	event := make(chan string)
	go func() {
		resp, _ := c.GetOOMEvent(ctx, &pb.GetOOMEventRequest{})
		event <- resp.GetContainerId()
	}()
	ok(t)(c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "glutton"}))
	if r := c.finish(t, "glutton", "glutton"); r.status != 128+9 {
		t.Errorf("a program over its limit: %v", r)
	}
	if id := <-event; id != "glutton" {
		t.Errorf("memory event of %q", id)
	}
	c.remove(t, "glutton")
}

// testEndOfSandbox removes all and lets the guest power itself off.
func testEndOfSandbox(t *testing.T, c *conformance) {
	ctx := t.Context()
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: watchID, Signal: uint32(unix.SIGKILL)}))
	if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: watchID}); err != nil || resp.Status != 128+9 {
		t.Errorf("wait: %v, %v", resp, err)
	}
	c.remove(t, watchID)
	ok(t)(c.RemoveStaleVirtiofsShareMounts(ctx, &pb.RemoveStaleVirtiofsShareMountsRequest{}))
	for _, m := range rpcMethods() {
		if m.name == "DestroySandbox" {
			wantCode(t, c.call(t, m, undecodable), codes.InvalidArgument)
		}
	}
	select {
	case <-c.exited:
		t.Error("the guest ended at a request that nobody can read")
	default:
	}
	for range 2 {
		ok(t)(c.DestroySandbox(ctx, &pb.DestroySandboxRequest{}))
	}
	select {
	case <-c.exited:
	case <-time.After(bootLimit):
		t.Error("the guest did not power itself off after DestroySandbox")
	}
}
