package agent

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	// callLimit is when a call that should have ended counts as hung.
	callLimit = time.Minute
	// patientLimit is how long the agent gets for calls that may wait, and waitLimit for those that may wait in vain.
	patientLimit = callLimit / 2
	waitLimit    = time.Second

	// watchID is the container that runs from the beginning to the end, boxID the one that calls are about.
	watchID, boxID = "watch", "box"
)

// unsupported are the methods that this guest refuses, and says so.
var unsupported = []string{
	"GetIPTables", "SetIPTables", "MemAgentMemcgSet", "MemAgentCompactSet", "MemHotplugByProbe", "SetPolicy",
	"OnlineCPUMem", "UpdateEphemeralMounts", "AddSwap", "AddSwapPath", "ResizeVolume",
}

// waiting are the methods that may wait for what a container or the kernel does.
var waiting = []string{"WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent"}

// TestConformance makes every call that a shim can make, with good input and bad, to a booted guest:
// the answer is the right one, and PID 1 lives and holds nothing that it should have let go.
func TestConformance(t *testing.T) {
	quietClient(t)
	disks := []string{
		"-drive", "if=none,id=volume,format=raw,file=" + makeDisk(t, t.TempDir(), 8), "-device", "virtio-blk-pci,drive=volume,addr=0b",
	}
	c := &conformance{guest: bootGuest(t, disks...), calls: make(map[string]map[string]map[codes.Code]int)}
	c.hangUp()
	c.options = []ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(c.intercept)}
	c.dial()
	c.buildRoots(t)

	batch := func(name string, f func(*testing.T)) {
		t.Run(name, func(t *testing.T) {
			c.batch = name
			started := time.Now()
			f(t)
			if c.first != nil {
				c.checkGuest(t)
			}
			t.Logf("%d calls in %v", c.count(name), time.Since(started).Round(time.Millisecond))
		})
	}
	batch("before the sandbox", func(t *testing.T) { testBeforeSandbox(t, c) })
	batch("life", func(t *testing.T) { testLife(t, c) })
	batch("wrong state", func(t *testing.T) { testWrongState(t, c) })
	batch("bad input", func(t *testing.T) { testBadInput(t, c) })
	batch("contradictions", func(t *testing.T) { testContradictions(t, c) })
	batch("extreme input", func(t *testing.T) { testExtremeInput(t, c) })
	batch("garbage on the line", func(t *testing.T) { testGarbage(t, c) })
	batch("at once", func(t *testing.T) { testAtOnce(t, c) })
	c.batch = "end"
	t.Run("end", func(t *testing.T) { testEndOfSandbox(t, c) })
	c.checkCoverage(t)
}

// quietClient keeps ttrpc from telling of each answer that comes too late, or is for the caller before.
func quietClient(t testing.TB) {
	out := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	t.Cleanup(func() { log.L.Logger.SetOutput(out) })
}

// conformance drives a guest and remembers how.
type conformance struct {
	*guest
	batch string
	// first is what the guest held when nothing but the watching container was there.
	first *guestView

	mu    sync.Mutex
	execs int
	calls map[string]map[string]map[codes.Code]int // by batch, method and answer
}

// serverLimit is a context's key for a deadline that only the agent is told of: the client waits on,
// and sees whether the agent keeps to it.
type serverLimit struct{}

// intercept notes each call and its answer, and lets none hang.
func (c *conformance) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, info *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if limit, ok := ctx.Value(serverLimit{}).(time.Duration); ok {
		req.TimeoutNano = limit.Nanoseconds()
	}
	ctx, cancel := context.WithTimeout(ctx, 2*callLimit)
	defer cancel()
	err := invoke(ctx, req, resp)
	code := status.Code(err)
	if err == nil {
		code = codes.Code(resp.Status.GetCode())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	methods := c.calls[c.batch]
	if methods == nil {
		methods = make(map[string]map[codes.Code]int)
		c.calls[c.batch] = methods
	}
	method := filepath.Base(info.FullMethod)
	if methods[method] == nil {
		methods[method] = make(map[codes.Code]int)
	}
	methods[method][code]++
	return err
}

func (c *conformance) count(batch string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, answers := range c.calls[batch] {
		for _, m := range answers {
			n += m
		}
	}
	return n
}

// rpcMethod is a method of one of the agent's services.
type rpcMethod struct {
	service, name     string
	request, response reflect.Type // of pointers
}

// rpcMethods returns all methods that Kata's protocol has.
func rpcMethods() []rpcMethod {
	var methods []rpcMethod
	for name, service := range map[string]reflect.Type{
		"grpc.AgentService": reflect.TypeFor[pb.AgentServiceService](),
		"grpc.Health":       reflect.TypeFor[pb.HealthService](),
	} {
		for i := range service.NumMethod() {
			m := service.Method(i)
			methods = append(methods, rpcMethod{name, m.Name, m.Type.In(1), m.Type.Out(0)})
		}
	}
	slices.SortFunc(methods, func(a, b rpcMethod) int { return strings.Compare(a.name, b.name) })
	return methods
}

// call makes a call of any kind. A method that may wait is given up by the agent, after patientLimit.
func (c *conformance) call(t *testing.T, m rpcMethod, req proto.Message) error {
	t.Helper()
	return c.callFor(t, m, req, patientLimit)
}

// answer makes a call whose answer is known, and which is given up soon if that is what the answer says.
func (c *conformance) answer(t *testing.T, m rpcMethod, req proto.Message, want codes.Code) error {
	t.Helper()
	if want == codes.DeadlineExceeded {
		return c.callFor(t, m, req, waitLimit)
	}
	return c.call(t, m, req)
}

func (c *conformance) callFor(t *testing.T, m rpcMethod, req proto.Message, limit time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	if slices.Contains(patient, m.name) {
		ctx = context.WithValue(ctx, serverLimit{}, limit)
	}
	err := c.client.Call(ctx, m.service, m.name, req, reflect.New(m.response.Elem()).Interface())
	if ctx.Err() != nil {
		t.Errorf("%s did not answer within %v", m.name, callLimit)
	}
	return err
}

// buildRoots makes the root that all containers of the test share.
func (c *conformance) buildRoots(t *testing.T) {
	t.Helper()
	buildRoot(t, c.guest, boxID)
	build := exec.Command("go", "build", "-o", filepath.Join(c.share, boxID, "rootfs/conformance"), "./testdata/conformance")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the conformance tool: %v\n%s", err, out)
	}
}

// own returns a process that runs a command of the conformance tool.
func own(command string) *pb.Process {
	p := tool(command)
	p.Args[0] = "/conformance"
	return p
}

// checkCoverage holds the test to its word: every method that Kata has is called in every way.
func (c *conformance) checkCoverage(t *testing.T) {
	for _, m := range rpcMethods() {
		life, good := c.calls["life"][m.name], codes.OK
		if slices.Contains(unsupported, m.name) {
			good = codes.Unimplemented
		}
		if m.name == "DestroySandbox" {
			life = c.calls["end"][m.name]
		} else if n := len(c.calls["extreme input"][m.name]); n == 0 {
			t.Errorf("%s is never called with extreme input", m.name)
		}
		if life[good] == 0 {
			t.Errorf("%s is never called as a shim calls it: answers %v", m.name, life)
		}
		if _, ok := goodRequests()[m.name]; !ok {
			t.Errorf("%s has no good request", m.name)
		}
	}
	for _, methods := range c.calls {
		for name, answers := range methods {
			if n := answers[codes.Internal] + answers[codes.Unknown]; n > 0 {
				t.Logf("%s: %d answers of no class", name, n)
			}
		}
	}
}

// accidents are what a console says when the agent or the kernel had one.
var accidents = regexp.MustCompile(`(?m)^.*(panic|fatal error|BUG:|Oops|goroutine \d+ \[).*$`)

// checkGuest asserts that the agent answers, that the container from the beginning runs, and that
// nothing is left of what came and went since.
func (c *conformance) checkGuest(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callLimit)
	defer cancel()
	if resp, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil || resp.Status != pb.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v, %v", resp, err)
	}
	if _, err := c.GetGuestDetails(ctx, &pb.GuestDetailsRequest{}); err != nil {
		t.Fatal(err)
	}
	var v *guestView
	var wrong string
	for end := time.Now().Add(callLimit); ; time.Sleep(100 * time.Millisecond) {
		v = c.look(t)
		if wrong = v.since(c.first); wrong == "" {
			break
		}
		if time.Now().After(end) { // what ends by itself had its time
			t.Errorf("the guest changed: %s", wrong)
			break
		}
	}
	t.Logf("guest: %d files, %d threads, %d goroutines, %d KiB", v.files(), v.Threads, v.Goroutines, v.KiB)
	console, err := os.ReadFile(c.console)
	if err != nil {
		t.Fatal(err)
	}
	if found := accidents.Find(console); found != nil {
		t.Errorf("the console says %.2000q", found)
	}
}

func (c *conformance) nextExec() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs++
	return fmt.Sprint("exec", c.execs)
}
