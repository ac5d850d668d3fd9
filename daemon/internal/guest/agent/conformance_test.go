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
	// callTimeout is how long the client waits for a response before the call counts as hung.
	callTimeout = time.Minute
	// serverTimeout is the deadline that the agent gets for calls that may wait, and shortTimeout the one for calls that
	// are expected to wait in vain.
	serverTimeout = callTimeout / 2
	shortTimeout  = time.Second

	// watchID is the container that runs from the beginning to the end of the test and reads the guest's resources.
	// containerID is the container under test.
	watchID, containerID = "watch", "box"
)

// unsupported are the methods that this guest does not support.
var unsupported = []string{
	"GetIPTables", "SetIPTables", "MemAgentMemcgSet", "MemAgentCompactSet", "MemHotplugByProbe", "SetPolicy",
	"OnlineCPUMem", "UpdateEphemeralMounts", "AddSwap", "AddSwapPath", "ResizeVolume",
}

// blockingMethods are the methods that may wait for a container or for the kernel.
var blockingMethods = []string{"WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent"}

// TestConformance boots a guest and makes every call that a shim can make, with valid and invalid input. It checks that
// each call gets the right response, and that PID 1 survives and leaks no resources.
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
			if c.baseline != nil {
				c.checkGuest(t)
			}
			t.Logf("%d calls in %v", c.count(name), time.Since(started).Round(time.Millisecond))
		})
	}
	batch("without a sandbox", func(t *testing.T) { testWithoutSandbox(t, c) })
	batch("lifecycle", func(t *testing.T) { testLifecycle(t, c) })
	batch("wrong state", func(t *testing.T) { testWrongState(t, c) })
	batch("bad input", func(t *testing.T) { testBadInput(t, c) })
	batch("contradictions", func(t *testing.T) { testContradictions(t, c) })
	batch("extreme input", func(t *testing.T) { testExtremeInput(t, c) })
	batch("garbage on the port", func(t *testing.T) { testGarbage(t, c) })
	batch("concurrent calls", func(t *testing.T) { testConcurrentCalls(t, c) })
	c.batch = "end"
	t.Run("end", func(t *testing.T) { testEndOfSandbox(t, c) })
	c.checkCoverage(t)
}

// quietClient discards ttrpc's log until the test ends. The client logs each response that comes too late or that was for
// a previous client.
func quietClient(t testing.TB) {
	out := log.L.Logger.Out
	log.L.Logger.SetOutput(io.Discard)
	t.Cleanup(func() { log.L.Logger.SetOutput(out) })
}

// conformance makes calls to a guest and counts them.
type conformance struct {
	*guest
	batch string // the name of the running batch
	// baseline is what the guest holds while the watching container is the only one.
	baseline *guestResources

	mu    sync.Mutex
	execs int                                      // execs that nextExec has named
	calls map[string]map[string]map[codes.Code]int // counts by batch, method and status code
}

// serverTimeoutKey is the context key of a timeout that is sent to the agent but not applied by the client. The client
// keeps waiting, which shows whether the agent respects the timeout.
type serverTimeoutKey struct{}

// intercept counts each call by its status code. It ends a call that hangs.
func (c *conformance) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, info *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if limit, ok := ctx.Value(serverTimeoutKey{}).(time.Duration); ok {
		req.TimeoutNano = limit.Nanoseconds()
	}
	ctx, cancel := context.WithTimeout(ctx, 2*callTimeout)
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

// count returns the number of calls in a batch.
func (c *conformance) count(batch string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, counts := range c.calls[batch] {
		for _, m := range counts {
			n += m
		}
	}
	return n
}

// rpcMethod is a method of one of the agent's services.
type rpcMethod struct {
	service, name     string
	request, response reflect.Type // pointer types
}

// rpcMethods returns all methods in Kata's agent protocol, sorted by name.
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

// call makes a call. The agent gives up a method that may wait after serverTimeout.
func (c *conformance) call(t *testing.T, m rpcMethod, req proto.Message) error {
	t.Helper()
	return c.callFor(t, m, req, serverTimeout)
}

// callExpecting is like call, but the agent gives the call up after shortTimeout if the expected code is DeadlineExceeded.
func (c *conformance) callExpecting(t *testing.T, m rpcMethod, req proto.Message, want codes.Code) error {
	t.Helper()
	if want == codes.DeadlineExceeded {
		return c.callFor(t, m, req, shortTimeout)
	}
	return c.call(t, m, req)
}

// callFor makes a call. The agent gives up a method that may wait after limit.
func (c *conformance) callFor(t *testing.T, m rpcMethod, req proto.Message, limit time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	if slices.Contains(slowMethods, m.name) {
		ctx = context.WithValue(ctx, serverTimeoutKey{}, limit)
	}
	err := c.client.Call(ctx, m.service, m.name, req, reflect.New(m.response.Elem()).Interface())
	if ctx.Err() != nil {
		t.Errorf("%s did not answer within %v", m.name, callTimeout)
	}
	return err
}

// buildRoots builds the root file system that all containers of the test share.
func (c *conformance) buildRoots(t *testing.T) {
	t.Helper()
	buildRoot(t, c.guest, containerID)
	build := exec.Command("go", "build", "-o", filepath.Join(c.share, containerID, "rootfs/conformance"), "./testdata/conformance")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the conformance tool: %v\n%s", err, out)
	}
}

// conformanceTool returns a process that runs a command of testdata/conformance.
func conformanceTool(command string) *pb.Process {
	p := tool(command)
	p.Args[0] = "/conformance"
	return p
}

// checkCoverage checks that the test has called every method of Kata's protocol with valid and with extreme input.
func (c *conformance) checkCoverage(t *testing.T) {
	for _, m := range rpcMethods() {
		lifecycle, good := c.calls["lifecycle"][m.name], codes.OK
		if slices.Contains(unsupported, m.name) {
			good = codes.Unimplemented
		}
		if m.name == "DestroySandbox" {
			lifecycle = c.calls["end"][m.name]
		} else if n := len(c.calls["extreme input"][m.name]); n == 0 {
			t.Errorf("%s is never called with extreme input", m.name)
		}
		if lifecycle[good] == 0 {
			t.Errorf("%s was never called with valid input and status code %v: %v", m.name, good, lifecycle)
		}
		if _, ok := goodRequests()[m.name]; !ok {
			t.Errorf("%s has no request in goodRequests", m.name)
		}
	}
	for _, methods := range c.calls {
		for name, counts := range methods {
			if n := counts[codes.Internal] + counts[codes.Unknown]; n > 0 {
				t.Logf("%s: %d calls failed with the code Internal or Unknown", name, n)
			}
		}
	}
}

// crashLine matches a line on the console that reports a crash of the agent or the kernel.
var crashLine = regexp.MustCompile(`(?m)^.*(panic|fatal error|BUG:|Oops|goroutine \d+ \[).*$`)

// checkGuest checks that the agent responds, that the watching container is running, and that the guest holds no more
// resources than in the baseline.
func (c *conformance) checkGuest(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	if resp, err := c.health.Check(ctx, &pb.CheckRequest{}); err != nil || resp.Status != pb.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v, %v", resp, err)
	}
	if _, err := c.GetGuestDetails(ctx, &pb.GuestDetailsRequest{}); err != nil {
		t.Fatal(err)
	}
	var v *guestResources
	for end := time.Now().Add(callTimeout); ; time.Sleep(100 * time.Millisecond) {
		v = c.readResources(t)
		changes := v.changesFrom(c.baseline)
		if changes == "" {
			break
		}
		if time.Now().After(end) { // resources may take a while to be released
			t.Errorf("the guest's resources changed: %s", changes)
			break
		}
	}
	t.Logf("guest: %d files, %d threads, %d goroutines, %d KiB", v.files(), v.Threads, v.Goroutines, v.KiB)
	console, err := os.ReadFile(c.console)
	if err != nil {
		t.Fatal(err)
	}
	if found := crashLine.Find(console); found != nil {
		t.Errorf("the console reports a crash: %.2000q", found)
	}
}

// nextExec returns an exec id that has not been used.
func (c *conformance) nextExec() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs++
	return fmt.Sprint("exec", c.execs)
}
