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

// testLifecycle makes all calls in the order in which a shim makes them: it creates a sandbox with a first container and a
// second container, and runs programs in both. It removes the second container but not the first.
func testLifecycle(t *testing.T, c *conformance) {
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
	// Check the connection and the agent's details.
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
			t.Errorf("details lack the storage driver %s: %v", driver, details)
		}
	}

	// Create the sandbox. The shim first sends a seed and the time to a guest that was restored from a snapshot.
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

	// Create the first container.
	send("CopyFile")
	ok(t)(c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: watchID, ExecId: watchID, OCI: watchSpec()}))
	ok(t)(c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: watchID}))
	c.baseline = c.readResources(t)
	if n := len(c.baseline.Processes); n != 2 {
		t.Errorf("processes are %q, want only PID 1 and the container's main process", c.baseline.Processes)
	}

	// Create the second container.
	ok(t)(c.CreateContainer(ctx, good["CreateContainer"].(*pb.CreateContainerRequest)))
	send("UpdateContainer")
	send("RemoveContainer") // a container that was never started
	c.createContainer(t, containerID, buildSpec(containerID))
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

	// End the second container. The shim waits twice. Output from before the exit can still be read.
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: containerID, Signal: uint32(unix.SIGUSR1)}))
	for range 2 {
		if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: containerID, ExecId: containerID}); err != nil || resp.Status != 7 {
			t.Errorf("wait: %v, %v; want status 7", resp, err)
		}
	}
	if r := c.finish(t, containerID, containerID); r != (result{"waiting\ngot user defined signal 1\n", "", 7}) {
		t.Errorf("main process: %v", r)
	}
	send("RemoveStaleVirtiofsShareMounts")
	c.remove(t, containerID)
}

// testExecs runs execs with output, an exit status, input, a terminal and signals.
func testExecs(t *testing.T, c *conformance) {
	ctx := t.Context()
	if r := c.run(t, containerID, "e1", tool("streams", "out", "err", "3")); r != (result{"out", "err", 3}) {
		t.Error(r)
	}
	if r := c.run(t, containerID, "e2", tool("streams", "", "", "255")); r != (result{"", "", 255}) {
		t.Error(r)
	}
	for range 2 {
		if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: containerID, ExecId: "e1"}); err != nil || resp.Status != 3 {
			t.Errorf("wait for an exited exec: %v, %v; want status 3", resp, err)
		}
	}

	c.exec(t, containerID, "e3", tool("copy"))
	if resp, err := c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "e3", Data: []byte("through")}); err != nil || resp.Len != 7 {
		t.Errorf("write: %v, %v; want length 7", resp, err)
	}
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: containerID, ExecId: "e3"}))
	ok(t)(c.CloseStdin(ctx, &pb.CloseStdinRequest{ContainerId: containerID, ExecId: "e3"}))
	if r := c.finish(t, containerID, "e3"); r != (result{"through", "", 0}) {
		t.Error(r)
	}

	p := tool("tty")
	p.Terminal, p.ConsoleSize = true, &pb.Box{Height: 30, Width: 100}
	c.exec(t, containerID, "e4", p)
	c.expect(t, "e4", "size 30x100")
	ok(t)(c.TtyWinResize(ctx, &pb.TtyWinResizeRequest{ContainerId: containerID, ExecId: "e4", Row: 40, Column: 120}))
	ok(t)(c.WriteStdin(ctx, &pb.WriteStreamRequest{ContainerId: containerID, ExecId: "e4", Data: []byte("hello\n")}))
	c.expect(t, "e4", "size 40x120")
	if r := c.finish(t, containerID, "e4"); r.status != 0 || r.stderr != "" {
		t.Error(r)
	}

	for sig, want := range map[unix.Signal]int32{unix.SIGUSR1: 7, unix.SIGTERM: 128 + 15, unix.SIGKILL: 128 + 9} {
		exec := c.nextExec()
		c.exec(t, containerID, exec, tool("wait"))
		c.expect(t, exec, "waiting\n")
		ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: exec, Signal: uint32(sig)}))
		if r := c.finish(t, containerID, exec); r.status != want {
			t.Errorf("exec after %v: %v, want status %d", sig, r, want)
		}
	}
}

// expect reads the output of an exec until it contains want.
func (c *conformance) expect(t *testing.T, exec, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	for got := ""; !strings.Contains(got, want); {
		resp, err := c.ReadStdout(ctx, &pb.ReadStreamRequest{ContainerId: containerID, ExecId: exec, Len: 1000})
		if err != nil {
			t.Fatalf("%s printed %q, want %q: %v", exec, got, want, err)
		}
		got += string(resp.Data)
	}
}

// testOOMEvent requests an OOM event before there is one, as the shim does.
func testOOMEvent(t *testing.T, c *conformance) {
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	spec := buildSpec(containerID)
	spec.Linux.Resources.Memory.Limit = 24 << 20
	spec.Process = tool("eat", "32")
	c.createContainer(t, "glutton", spec)
	event := make(chan string)
	go func() {
		resp, _ := c.GetOOMEvent(ctx, &pb.GetOOMEventRequest{})
		event <- resp.GetContainerId()
	}()
	ok(t)(c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "glutton"}))
	if r := c.finish(t, "glutton", "glutton"); r.status != 128+9 {
		t.Errorf("program over the memory limit: %v, want status %d", r, 128+9)
	}
	if id := <-event; id != "glutton" {
		t.Errorf("OOM event of container %q, want glutton", id)
	}
	c.remove(t, "glutton")
}

// testEndOfSandbox removes the last container and destroys the sandbox. The guest must power itself off.
func testEndOfSandbox(t *testing.T, c *conformance) {
	ctx := t.Context()
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: watchID, Signal: uint32(unix.SIGKILL)}))
	if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: watchID}); err != nil || resp.Status != 128+9 {
		t.Errorf("wait: %v, %v; want status %d", resp, err, 128+9)
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
		t.Error("the guest powered off after a DestroySandbox request that cannot be decoded")
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
