package agent

import (
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// requestFor returns m's request in goodRequests with another container id and exec id. It returns nil if the request has
// no container id. hasExec reports whether it has an exec id.
func requestFor(m rpcMethod, container, exec string) (req proto.Message, hasExec bool) {
	req = proto.Clone(goodRequests()[m.name])
	set := func(field protoreflect.Name, value string) bool {
		f := req.ProtoReflect().Descriptor().Fields().ByName(field)
		if f == nil {
			return false
		}
		req.ProtoReflect().Set(f, protoreflect.ValueOfString(value))
		return true
	}
	if !set("container_id", container) {
		return nil, false
	}
	return req, set("exec_id", exec)
}

// testWrongState makes calls on containers and processes that do not exist, have not been started or have exited.
func testWrongState(t *testing.T, c *conformance) {
	c.startFixture(t)
	c.startContainer(t, "removed")
	c.remove(t, "removed")
	each := func(what, container, exec string, want func(m rpcMethod, hasExec bool) codes.Code) {
		t.Helper()
		for _, m := range rpcMethods() {
			req, hasExec := requestFor(m, container, exec)
			creates := m.name == "CreateContainer" || m.name == "ExecProcess" && exec == "nosuch"
			if req == nil || creates || m.name == "RemoveContainer" && (container == containerID || container == "fresh") {
				continue
			}
			code := want(m, hasExec)
			if err := c.callExpecting(t, m, req, code); status.Code(err) != code {
				t.Errorf("%s with %s: %v, want status code %v", m.name, what, err, code)
			}
		}
	}
	always := func(code codes.Code) func(rpcMethod, bool) codes.Code {
		return func(rpcMethod, bool) codes.Code { return code }
	}
	each("an unknown container", "nosuch", "x", always(codes.NotFound))
	each("a removed container", "removed", "x", always(codes.NotFound))
	each("an empty container id", "", "x", always(codes.InvalidArgument))
	each("a container id with dots", "../box", "x", always(codes.InvalidArgument))

	// If the container exists, the agent looks up the process.
	process := func(code codes.Code) func(rpcMethod, bool) codes.Code {
		return func(m rpcMethod, hasExec bool) codes.Code {
			switch {
			case m.name == "StartContainer":
				return codes.FailedPrecondition
			case hasExec:
				return code
			default:
				return codes.OK
			}
		}
	}
	each("an unknown process", containerID, "nosuch", process(codes.NotFound))
	each("an exec id with a slash", containerID, "a/b", process(codes.InvalidArgument))

	// Create, pause and resume twice, and exec in a paused container.
	ctx := t.Context()
	_, err := c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: containerID, ExecId: containerID, OCI: buildSpec(containerID)})
	wantCode(t, err, codes.AlreadyExists)
	for _, exec := range []string{containerID, endedExec, sinkExec} {
		_, err = c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: containerID, ExecId: exec, Process: tool("self")})
		wantCode(t, err, codes.AlreadyExists)
	}
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: containerID}))
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: containerID}))
	_, err = c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: containerID, ExecId: "frozen", Process: tool("self")})
	wantCode(t, err, codes.FailedPrecondition)
	ok(t)(c.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: containerID}))
	ok(t)(c.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: containerID}))
	ok(t)(c.CreateSandbox(ctx, goodRequests()["CreateSandbox"].(*pb.CreateSandboxRequest)))

	// A paused container can be killed and removed.
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: containerID}))
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: containerID, Signal: uint32(unix.SIGKILL)}))
	for _, exec := range []string{containerID, sinkExec, ttyExec} {
		if r := c.finish(t, containerID, exec); r.status != 128+9 {
			t.Errorf("%s of a killed container: %v, want status %d", exec, r, 128+9)
		}
	}
	each("a container that has exited", containerID, "", failedPrecondition("StartContainer", "ExecProcess", "WriteStdin", "TtyWinResize").
		with(codes.OutOfRange, "ReadStdout", "ReadStderr").with(codes.InvalidArgument, "ExecProcess").code)
	c.remove(t, containerID)

	// The calls run in alphabetical order: CloseStdin comes before WriteStdin, and StartContainer starts the container
	// before the calls after it.
	c.createContainer(t, "fresh", buildSpec(containerID))
	each("a container that was not started", "fresh", "", failedPrecondition("TtyWinResize", "WriteStdin").
		with(codes.DeadlineExceeded, "WaitProcess", "ReadStdout", "ReadStderr").with(codes.InvalidArgument, "ExecProcess").code)
	c.remove(t, "fresh")
	testNeverStarted(t, c)
}

// testNeverStarted kills a container before its start.
func testNeverStarted(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.createContainer(t, "fresh", buildSpec(containerID))
	_, err := c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: "fresh", ExecId: "early", Process: tool("self")})
	wantCode(t, err, codes.FailedPrecondition)
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: "fresh", Signal: uint32(unix.SIGKILL)}))
	if resp, err := c.WaitProcess(ctx, &pb.WaitProcessRequest{ContainerId: "fresh"}); err != nil || resp.Status != 128+9 {
		t.Errorf("wait: %v, %v", resp, err)
	}
	_, err = c.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: "fresh"})
	wantCode(t, err, codes.FailedPrecondition)
	c.remove(t, "fresh")
}

// expectedCodes are the status codes of calls on a container in some state, by method. Other calls succeed.
type expectedCodes map[string]codes.Code

// failedPrecondition returns expectedCodes in which methods fail with codes.FailedPrecondition.
func failedPrecondition(methods ...string) expectedCodes {
	a := make(expectedCodes)
	return a.with(codes.FailedPrecondition, methods...)
}

func (a expectedCodes) with(code codes.Code, methods ...string) expectedCodes {
	for _, m := range methods {
		a[m] = code
	}
	return a
}

func (a expectedCodes) code(m rpcMethod, _ bool) codes.Code { return a[m.name] }
