package agent

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// raw returns a message whose encoding is data.
func raw(data []byte) proto.Message {
	m := &emptypb.Empty{}
	m.ProtoReflect().SetUnknown(data)
	return m
}

// undecodable is a message with a field whose length exceeds the message.
var undecodable = raw([]byte{0x0a, 0xff, 0x01})

// refusalCodes are the status codes with which the agent refuses bad input. Any other error code means that the agent
// tried to process the input until something failed.
var refusalCodes = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.FailedPrecondition, codes.Unimplemented, codes.OutOfRange,
	codes.ResourceExhausted,
}

// slowMethods are the methods that may wait for a device, those that take long for a long request, and blockingMethods.
var slowMethods = append([]string{
	"UpdateInterface", "UpdateRoutes", "AddARPNeighbors",
}, blockingMethods...)

// testExtremeInput calls each method with valid requests in which one field, or several, have extreme values. It tries a
// random selection of them, or all with MSB_SOAK=1. MSB_SEED selects others.
func testExtremeInput(t *testing.T, c *conformance) {
	seed, _ := strconv.ParseUint(os.Getenv("MSB_SEED"), 10, 64)
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	c.startFixture(t)
	methods := rpcMethods()
	for _, m := range methods {
		switch m.name {
		case "DestroySandbox":
			continue // see testEndOfSandbox
		case "RemoveContainer", "UpdateContainer":
			_, err := c.CreateContainer(t.Context(), goodRequests()["CreateContainer"].(*pb.CreateContainerRequest))
			if status.Code(err) != codes.AlreadyExists {
				ok(t)(nil, err)
			}
		}
		good := goodRequests()[m.name]
		all := mutations(good)
		singles, combined := 6, 2 // requests with one extreme value and with several
		switch {
		case os.Getenv("MSB_SOAK") == "1":
			singles, combined = -1, 200
		case len(all) < 5:
			combined = 0
		}
		started := time.Now()
		counts := make(map[codes.Code]int)
		for _, change := range pick(rnd, all, singles) {
			counts[c.tryExtreme(t, m, change.field, mutated(good, change))]++
		}
		for range combined {
			some := pick(rnd, all, 2+rnd.IntN(4))
			var fields []string
			for _, s := range some {
				fields = append(fields, s.field)
			}
			counts[c.tryExtreme(t, m, strings.Join(fields, ", "), mutated(good, some...))]++
		}
		wantCode(t, c.call(t, m, undecodable), codes.InvalidArgument)
		want := emptyRequestCode(m)
		if err := c.callExpecting(t, m, raw(nil), want); status.Code(err) != want {
			t.Errorf("%s without fields: %v, want status code %v", m.name, err, want)
		}
		t.Logf("%s: %d mutations, status codes %v in %v", m.name, len(all), counts, time.Since(started).Round(time.Millisecond))
	}
	for _, id := range []string{containerID, "made"} {
		_, _ = c.RemoveContainer(t.Context(), &pb.RemoveContainerRequest{ContainerId: id})
	}
	for _, name := range []string{"UpdateInterface", "UpdateRoutes", "CreateSandbox"} {
		for _, m := range methods {
			if m.name == name {
				ok(t)(nil, c.call(t, m, goodRequests()[name]))
			}
		}
	}
	now := time.Now()
	ok(t)(c.SetGuestDateTime(t.Context(), &pb.SetGuestDateTimeRequest{Sec: now.Unix()}))
}

// tryExtreme makes one call, checks its status code, and undoes the effect of a successful call.
func (c *conformance) tryExtreme(t *testing.T, m rpcMethod, what string, req proto.Message) codes.Code {
	t.Helper()
	ctx := t.Context()
	if e, isExec := req.(*pb.ExecProcessRequest); isExec && e.ExecId == "new" {
		e.ExecId = c.nextExec()
	}
	data, err := encode(req)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > frameLimit-1<<10 {
		return codes.Aborted // ttrpc's client would not send such a large request
	}
	err = c.callFor(t, m, raw(data), shortTimeout)
	code := status.Code(err)
	long := slices.Contains(slowMethods, m.name) || strings.Contains(what, "many entries")
	gaveUp := code == codes.DeadlineExceeded && long
	if code != codes.OK && !slices.Contains(refusalCodes, code) && !gaveUp {
		t.Errorf("%s with %s: %v", m.name, what, err)
	}
	switch req := req.(type) {
	case *pb.CreateContainerRequest:
		if code == codes.OK {
			ok(t)(c.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: req.ContainerId}))
		}
	case *pb.ExecProcessRequest:
		if code == codes.OK {
			ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, ExecId: req.ExecId, Signal: uint32(unix.SIGKILL)}))
			c.finish(t, containerID, req.ExecId)
		}
	case *pb.PauseContainerRequest:
		ok(t)(c.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: containerID}))
	case *pb.RemoveContainerRequest:
		if code == codes.OK {
			c.createContainer(t, "made", buildSpec(containerID))
		}
	}
	return code
}

// emptyRequestCode returns the status code that a request without fields must get.
func emptyRequestCode(m rpcMethod) codes.Code {
	if slices.Contains(unsupported, m.name) {
		return codes.Unimplemented
	}
	switch m.name {
	case "Check", "Version", "CreateSandbox", "GetGuestDetails", "GetMetrics", "ListInterfaces", "ListRoutes",
		"UpdateRoutes", "AddARPNeighbors", "RemoveStaleVirtiofsShareMounts":
		return codes.OK
	case "GetOOMEvent":
		return codes.DeadlineExceeded
	case "GetVolumeStats":
		return codes.NotFound
	default:
		return codes.InvalidArgument
	}
}
