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

// about returns m's good request about another container and process; no exec leaves it out.
func about(m rpcMethod, container, exec string) (req proto.Message, hasExec bool) {
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

// testWrongState makes calls about containers and processes that are not there, not yet, or no longer.
func testWrongState(t *testing.T, c *conformance) {
	c.startFixture(t)
	c.startBox(t, "removed")
	c.remove(t, "removed")
	each := func(what, container, exec string, want func(m rpcMethod, hasExec bool) codes.Code) {
		t.Helper()
		for _, m := range rpcMethods() {
			req, hasExec := about(m, container, exec)
			makes := m.name == "CreateContainer" || m.name == "ExecProcess" && exec == "nosuch"
			if req == nil || makes || m.name == "RemoveContainer" && (container == boxID || container == "fresh") {
				continue
			}
			code := want(m, hasExec)
			if err := c.answer(t, m, req, code); status.Code(err) != code {
				t.Errorf("%s of %s: got %v, want %v", m.name, what, err, code)
			}
		}
	}
	always := func(code codes.Code) func(rpcMethod, bool) codes.Code {
		return func(rpcMethod, bool) codes.Code { return code }
	}
	each("an unknown container", "nosuch", "x", always(codes.NotFound))
	each("a removed container", "removed", "x", always(codes.NotFound))
	each("no container", "", "x", always(codes.InvalidArgument))
	each("a container outside", "../box", "x", always(codes.InvalidArgument))

	// A process is looked for after its container.
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
	each("an unknown process", boxID, "nosuch", process(codes.NotFound))
	each("a process outside", boxID, "a/b", process(codes.InvalidArgument))

	// Twice.
	ctx := t.Context()
	_, err := c.CreateContainer(ctx, &pb.CreateContainerRequest{ContainerId: boxID, ExecId: boxID, OCI: buildSpec(boxID)})
	wantCode(t, err, codes.AlreadyExists)
	for _, exec := range []string{boxID, endedExec, sinkExec} {
		_, err = c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: boxID, ExecId: exec, Process: tool("self")})
		wantCode(t, err, codes.AlreadyExists)
	}
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: boxID}))
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: boxID}))
	_, err = c.ExecProcess(ctx, &pb.ExecProcessRequest{ContainerId: boxID, ExecId: "frozen", Process: tool("self")})
	wantCode(t, err, codes.FailedPrecondition)
	ok(t)(c.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: boxID}))
	ok(t)(c.ResumeContainer(ctx, &pb.ResumeContainerRequest{ContainerId: boxID}))
	ok(t)(c.CreateSandbox(ctx, goodRequests()["CreateSandbox"].(*pb.CreateSandboxRequest)))

	// A paused container can be killed, and removed.
	ok(t)(c.PauseContainer(ctx, &pb.PauseContainerRequest{ContainerId: boxID}))
	ok(t)(c.SignalProcess(ctx, &pb.SignalProcessRequest{ContainerId: boxID, Signal: uint32(unix.SIGKILL)}))
	for _, exec := range []string{boxID, sinkExec, ttyExec} {
		if r := c.finish(t, boxID, exec); r.status != 128+9 {
			t.Errorf("%s of a killed container: %v", exec, r)
		}
	}
	each("a container that has ended", boxID, "", inState("StartContainer", "ExecProcess", "WriteStdin", "TtyWinResize").
		but(codes.OutOfRange, "ReadStdout", "ReadStderr").but(codes.InvalidArgument, "ExecProcess").code)
	c.remove(t, boxID)

	// Its input is closed before it is written to, and it is started on the way.
	c.createBox(t, "fresh", buildSpec(boxID))
	each("a container that was not started", "fresh", "", inState("TtyWinResize", "WriteStdin").
		but(codes.DeadlineExceeded, "WaitProcess", "ReadStdout", "ReadStderr").but(codes.InvalidArgument, "ExecProcess").code)
	c.remove(t, "fresh")
	testNeverStarted(t, c)
}

// testNeverStarted kills a container before its start.
func testNeverStarted(t *testing.T, c *conformance) {
	ctx := t.Context()
	c.createBox(t, "fresh", buildSpec(boxID))
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

// answers says which code a call about a container in some state gets, by its method; others succeed.
type answers map[string]codes.Code

func inState(refused ...string) answers {
	a := make(answers)
	return a.but(codes.FailedPrecondition, refused...)
}

func (a answers) but(code codes.Code, methods ...string) answers {
	for _, m := range methods {
		a[m] = code
	}
	return a
}

func (a answers) code(m rpcMethod, _ bool) codes.Code { return a[m.name] }
