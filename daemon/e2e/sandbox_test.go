package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// guideCurl is the guide's request, verbatim. The test replaces the address and the key, and adds -s.
const guideCurl = `curl -X POST http://127.0.0.1:5555/api/v1/rpc \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer your-api-key-here" \
  -d '{
    "jsonrpc": "2.0",
    "method": "sandbox.start",
    "params": {
      "sandbox": "my-env",
      "namespace": "default"
    },
    "id": "1"
  }'`

// TestSandboxLifecycle starts a sandbox with the guide's request, runs code and a command in it, reads its metrics,
// stops it and starts it again.
func TestSandboxLifecycle(t *testing.T) {
	s, key := sharedServer(t)
	script := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key, "curl -X", "curl -s -X").Replace(guideCurl)
	out, err := exec.Command("bash", "-c", script).CombinedOutput()
	if want := `{"jsonrpc":"2.0","id":"1","result":"Sandbox my-env started successfully"}`; err != nil {
		t.Fatalf("curl: %v\n%s", err, out)
	} else if !sameJSON(t, out, []byte(want)) {
		t.Fatalf("curl: %s, want %s", out, want)
	}

	// Each running kernel has its own boot id, even if host and guest have the same kernel installed.
	const bootID = "/proc/sys/kernel/random/boot_id"
	r := s.python(t, key, "my-env", "print(open('"+bootID+"').read().strip())")
	host, err := os.ReadFile(bootID)
	if guest := r.text("stdout"); err != nil || len(guest) != len(host) || guest == string(host) {
		t.Errorf("the boot id in the sandbox is %q, on the host %q, error %v: want two different ids", guest, host, err)
	}
	s.python(t, key, "my-env", "x = 20")
	if got := s.python(t, key, "my-env", "x + 22").text("stdout"); got != "42\n" {
		t.Errorf("x + 22: got %q, want 42: the session does not keep its state", got)
	}
	r = s.python(t, key, "my-env", "print('before')\n1/0")
	if r.Status != "error" || r.text("stdout") != "before\n" || !strings.Contains(r.text("stderr"), "ZeroDivisionError") {
		t.Errorf("code that raises an exception: %+v", r)
	}
	c := s.command(t, key, "my-env", "sh", "-c", "echo out; echo err >&2; exit 3")
	if c.ExitCode != 3 || c.Success || c.text("stdout") != "out\n" || c.text("stderr") != "err\n" {
		t.Errorf("command: got %+v, want exit code 3 and its output on both streams", c)
	}

	// Use memory, disk and processor time, so that the metrics are above zero.
	s.python(t, key, "my-env", "import os\nb = bytearray(64 << 20)\nopen('/root/data', 'wb').write(b)\nos.sync()\nsum(range(2000000))")
	var m struct{ Sandboxes []metrics }
	s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": "my-env"}, &m)
	if len(m.Sandboxes) != 1 {
		t.Fatalf("metrics: %+v, want one sandbox", m)
	}
	if got := m.Sandboxes[0]; !got.Running || got.Namespace != "default" || got.CPU <= 0 || got.Memory == nil || *got.Memory < 64 || got.Disk == nil || *got.Disk < 64<<20 {
		t.Errorf("metrics: %+v, want it running in namespace default, with CPU use, at least 64 MiB of memory and 64 MiB of disk", got)
	}

	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "my-env"}, nil)
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "my-env", "language": "python", "code": "1"}, 404, -32003, "my-env")
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "my-env"}, nil)
	if r := s.python(t, key, "my-env", "x"); r.Status != "error" || !strings.Contains(r.text("stderr"), "NameError") {
		t.Errorf("x in a new sandbox: got %+v, want a NameError, because x was set in the stopped one", r)
	}
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "my-env"}, nil)
}

// metrics are the metrics of a sandbox, as sandbox.metrics.get returns them. Memory is in MiB, disk in bytes.
type metrics struct {
	Namespace, Name string
	Running         bool
	CPU             float64 `json:"cpu_usage"`
	Memory          *int64  `json:"memory_usage"`
	Disk            *int64  `json:"disk_usage"`
}

func TestNode(t *testing.T) {
	s, key := startSandbox(t, "node", "microsandbox/node")
	run := func(code string) runResult {
		var r runResult
		s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": "node", "language": "nodejs", "code": code}, &r)
		return r
	}
	run("const x = 20")
	if got := run("x + 22").text("stdout"); got != "42\n" {
		t.Errorf("x + 22: got %q, want 42: the session does not keep its state", got)
	}
	if r := run("throw new TypeError('boom')"); r.Status != "error" || !strings.Contains(r.text("stderr"), "TypeError: boom") {
		t.Errorf("code that throws an error: %+v", r)
	}
	if r := s.command(t, key, "node", "npm", "--version"); r.ExitCode != 0 {
		t.Errorf("npm --version: %+v", r)
	}
	// The image's Node removes types, and keeps the output of a timer out of later runs.
	if got := run("interface P { n: number }; enum E { A = 3 }; const x: number = ({ n: 4 } as P).n; x * E.A").text("stdout"); got != "12\n" {
		t.Errorf("TypeScript: got %q, want 12", got)
	}
	run("setTimeout(() => { console.log('late'); globalThis.printed() }, 50); const wait = new Promise((done) => { globalThis.printed = done })")
	if got := run("await wait; 'done'").text("stdout"); got != "'done'\n" {
		t.Errorf("a run during which a timer of an earlier one prints: got %q, want only 'done'", got)
	}
	var log runResult
	s.mustCall(t, key, "sandbox.process.logs", params{"sandbox": "node", "tag": "repl:node"}, &log)
	if got := log.text("stdout"); got != "late\n" {
		t.Errorf("the log of the interpreter is %q, want late", got)
	}

	// Contexts and results.
	var created struct{ Context, Language string }
	s.mustCall(t, key, "sandbox.context.create", params{"sandbox": "node", "language": "js", "context": "other", "cwd": "/tmp"}, &created)
	var shown struct {
		Results []struct {
			Data map[string]any
			Main bool `json:"is_main"`
		}
		Count int
	}
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": "node", "context": "other", "code": "display.html('<b>'); typeof x + process.cwd()", "results": true}, &shown)
	if r := shown.Results; created.Language != "node" || shown.Count != 1 || len(r) != 2 || r[0].Data["text/html"] != "<b>" || r[0].Main || r[1].Data["text/plain"] != "'undefined/tmp'" || !r[1].Main {
		t.Errorf("results in the context %+v: %+v", created, shown)
	}
	s.mustCall(t, key, "sandbox.context.remove", params{"sandbox": "node", "context": "other"}, nil)
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "node", "context": "other", "code": "1"}, 404, -32003, "other")
	var r runResult
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": "node", "language": "bash", "code": "n=5; echo $n$((n + 1))"}, &r)
	if got := r.text("stdout"); got != "56\n" {
		t.Errorf("bash: %+v, want 56", r)
	}

	// The image can be removed once no sandbox uses it.
	if _, stderr, err := s.msb("image", "rm", "microsandbox/node"); err == nil || !strings.Contains(stderr, "used by the sandbox default/node") {
		t.Errorf("msb image rm while a sandbox runs: %v: %s", err, stderr)
	}
	run("x")
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "node"}, nil)
	s.removeImage(t, "node")
	s.wantError(t, key, "sandbox.start", params{"sandbox": "node", "config": params{"image": "microsandbox/node"}}, 400, -32602, "no image microsandbox/node")
}

// The image code-interpreter shows tables and charts, also to the user "user". It has its own server, because make test runs it
// after the other tests.
func TestCodeInterpreter(t *testing.T) {
	s := testServer(t)
	if err := s.importImages("code-interpreter"); err != nil {
		t.Fatal(err)
	}
	key := s.newKey(t)
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "interpreter", "config": params{"image": "microsandbox/code-interpreter"}}, nil)
	var shown struct {
		runResult
		Results []struct {
			Data map[string]any
			Main bool `json:"is_main"`
		}
	}
	s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": "interpreter", "language": "python", "user": "user", "results": true, "code": `import os, matplotlib.pyplot as plt, numpy, pandas
print(os.getcwd())
plt.plot(numpy.arange(3))
plt.show()
plt.plot([3, 2, 1])
pandas.DataFrame({"a": [1, 2], "b": ["x", None]})`}, &shown)
	if shown.Status != "success" || shown.text("stdout") != "/home/user\n" || shown.text("stderr") != "" || len(shown.Results) != 3 {
		t.Fatalf("run: %+v", shown)
	}
	chart, table, last := shown.Results[0], shown.Results[1], shown.Results[2]
	for _, r := range []map[string]any{chart.Data, last.Data} {
		if png, _ := r["image/png"].(string); !strings.HasPrefix(png, "iVBORw0KGgo") { // the beginning of a PNG file in base64
			t.Errorf("a chart is %.100v", r)
		}
	}
	html, _ := table.Data["text/html"].(string)
	columns := fmt.Sprint(table.Data["application/vnd.dataframe+json"])
	if !table.Main || chart.Main || last.Main || !strings.Contains(html, "<table") || columns != "map[a:[1 2] b:[x <nil>]]" {
		t.Errorf("the table is %+v", table)
	}

	// An assistant gets the chart as an image.
	session := s.mcpSession(t, key)
	result, err := session.CallTool(t.Context(), &mcp.CallToolParams{Name: "sandbox_run_code", Arguments: params{
		"sandbox": "interpreter", "language": "python", "user": "user", "code": "plt.plot([1, 2])\nNone",
	}})
	if err != nil || result.IsError || len(result.Content) != 2 {
		t.Fatalf("sandbox_run_code: %+v, %v", result, err)
	}
	if image, ok := result.Content[1].(*mcp.ImageContent); !ok || image.MIMEType != "image/png" || !bytes.HasPrefix(image.Data, []byte("\x89PNG")) {
		t.Errorf("the chart is %+v", result.Content[1])
	}
}

// TestTimeoutsAndExitCodes tests runs over their time limit, a program that does not exist, a background child and a
// command that is killed.
func TestTimeoutsAndExitCodes(t *testing.T) {
	s, key := sharedSandbox(t)
	s.python(t, key, "box", "x = 5")
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "while True: pass", "timeout": 1}, 504, -32007, "")
	if got := s.python(t, key, "box", "x").text("stdout"); got != "5\n" {
		t.Errorf("x after a run that was interrupted: got %q, want 5", got)
	}
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "sleep", "args": []string{"60"}, "timeout": 1}, 504, -32007, "")
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "no-such-program"}, 422, -32008, "no-such-program")
	// A command that leaves a background child returns at its own end.
	if r := s.command(t, key, "box", "sh", "-c", "sleep 9999 & echo started"); r.text("stdout") != "started\n" {
		t.Errorf("command with a background child: got %+v, want its output", r)
	}
	if r := s.command(t, key, "box", "sh", "-c", "kill -9 $$"); r.ExitCode != 137 {
		t.Errorf("command killed by SIGKILL: got %+v, want exit code 137", r)
	}
}

func TestSandboxConfiguration(t *testing.T) {
	s, key := sharedServer(t)
	cfg := params{"image": "microsandbox/python", "memory": 256, "cpus": 2, "envs": []string{"GREETING=hello"},
		"workdir": "/srv/new/dir", "user": "nobody", "hostname": "web-1", "volumes": nil, "ports": nil}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "configured", "config": cfg}, nil)
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "configured"}) })
	const want = "hello /srv/new/dir 65534 65534 web-1\n" // the directory did not exist; it belongs to the user
	got := s.python(t, key, "configured",
		"import os\nprint(os.environ['GREETING'], os.getcwd(), os.getuid(), os.stat('.').st_uid, os.uname().nodename)").text("stdout")
	if got != want {
		t.Errorf("Python sees %q, want %q", got, want)
	}
	if r := s.command(t, key, "configured", "sh", "-c", "echo $GREETING $PWD $(id -u) $(stat -c %u .) $(cat /etc/hostname)"); r.text("stdout") != want {
		t.Errorf("a command sees %+v, want %q", r, want)
	}
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "configured", "language": "nodejs", "code": "1"}, 409, -32005, "node")
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "configured", "config": cfg}, nil) // the same configuration: no error
	cfg["memory"] = 512
	s.wantError(t, key, "sandbox.start", params{"sandbox": "configured", "config": cfg}, 409, -32005, "memory is 256 MiB, not 512")
}

// TestPortalProcesses tests that no process connects to the portal, or with Kata's own driver, that the process that does so
// has the user of the main process and no more rights. It also tests that root in the sandbox can neither put another program in
// the place of the portal nor write to the console of the guest.
func TestPortalProcesses(t *testing.T) {
	s, key := sharedSandbox(t)
	got := s.python(t, key, "box", `import glob, os
def rights(pid):
    status = dict(line.rstrip().split(":", 1) for line in open(f"/proc/{pid}/status"))
    return [status[key].split() for key in ("Uid", "Gid", "Groups", "NoNewPrivs")]
def capabilities(pid):
    return [int(line.split()[1], 16) for line in open(f"/proc/{pid}/status") if line.startswith("CapBnd")][0]
arguments = {pid: open(f"/proc/{pid}/cmdline").read().split("\0") for pid in os.listdir("/proc") if pid.isdigit()}
connect = [pid for pid, args in arguments.items() if args[1:2] == ["connect"]]
print(rights(1), len(connect) > 0, all(rights(pid) == rights(1) and capabilities(pid) & ~capabilities(1) == 0 for pid in connect))
portal = arguments["1"][0]
for name in portal, os.path.dirname(portal):
    for change in os.unlink, lambda path: os.rename(path, "/moved"):
        try:
            change(name)
            print("changed", name)
        except OSError:
            pass
try:
    open(portal, "r+")
    print("opened", portal)
except OSError:
    pass
os.mknod("/dev/c0", 0o020600, os.makedev(5, 1)) # the guest's console, which the host logs
try:
    open("/dev/c0", "wb")
    print("opened the console")
except PermissionError:
    os.unlink("/dev/c0")
`).text("stdout")
	connects := "False"
	if hypervisorSettings["hypervisor"] == "kata" {
		connects = "True"
	}
	if want := "[['0', '0', '0', '0'], ['0', '0', '0', '0'], ['0'], ['0']] " + connects + " True\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := s.command(t, key, "box", "sh", "-c", "ulimit -S -n; ulimit -H -n").text("stdout"); got != "65536\n1048576\n" {
		t.Errorf("the limits of open files of a command are %q", got)
	}
}

func TestSandboxesAreIsolated(t *testing.T) {
	s, key := sharedSandbox(t)
	startSandbox(t, "another", "microsandbox/python")
	if r := s.command(t, key, "box", "sh", "-c", "echo secret > /root/file && cat /root/file"); r.text("stdout") != "secret\n" {
		t.Fatalf("write a file in box: %+v", r)
	}
	if r := s.command(t, key, "another", "cat", "/root/file"); r.ExitCode != 1 || !strings.Contains(r.text("stderr"), "No such file") {
		t.Errorf("cat /root/file in a sandbox without this file: %+v, want that there is no such file", r)
	}
	ids := map[string]bool{}
	for _, name := range []string{"box", "another"} {
		ids[s.command(t, key, name, "cat", "/proc/sys/kernel/random/boot_id").text("stdout")] = true
	}
	if len(ids) != 2 || ids[""] {
		t.Errorf("the kernels of two sandboxes have the boot ids %v, want two different ones", ids)
	}
}

// TestSandboxHasNoNetwork tests that a sandbox has no route to any address outside of it, that its loopback interface is not the
// host's, and that the host answers nothing on the link between them.
func TestSandboxHasNoNetwork(t *testing.T) {
	s, key := sharedSandbox(t)
	interfaces, gateway := "eth0\nlo\n", "10.0.2.2: timed out timed out\n"
	if hypervisorSettings["hypervisor"] == "kata" {
		interfaces, gateway = "lo\n", "10.0.2.2: ENETUNREACH ENETUNREACH\n"
	}
	if got := s.command(t, key, "box", "ls", "/sys/class/net").text("stdout"); got != interfaces {
		t.Errorf("network interfaces: %q, want %q", got, interfaces)
	}
	// Addresses of the host, of a cloud's metadata service, and some that are for documentation.
	targets := []string{"169.254.169.254", "192.0.2.1", "2001:db8::1"}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if ip := a.(*net.IPNet).IP; ip.IsGlobalUnicast() {
			targets = append(targets, ip.String())
		}
	}
	want := "127.0.0.1: ECONNREFUSED\n" // the host listens there
	for _, target := range targets {
		want += target + ": ENETUNREACH ENETUNREACH\n"
	}
	_, port, _ := strings.Cut(s.address, ":")
	r := s.python(t, key, "box", `import errno, socket
def connect(address, kind):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as s:
        s.settimeout(1)
        try:
            s.connect((address, `+port+`))
            s.send(b"x")
            s.recv(1)
        except TimeoutError:
            return "timed out"
        except OSError as e:
            return errno.errorcode.get(e.errno, repr(e))
        return "answered"
print("127.0.0.1:", connect("127.0.0.1", socket.SOCK_STREAM))
for address in "`+strings.Join(append(targets, "10.0.2.2"), " ")+`".split():
    print(address + ":", connect(address, socket.SOCK_STREAM), connect(address, socket.SOCK_DGRAM))`)
	if got := r.text("stdout"); got != want+gateway {
		t.Errorf("connections from a sandbox: got %+v, want:\n%s", r, want+gateway)
	}
}

// TestPing tests that root in a sandbox can use ping, but cannot write packets of its own.
func TestPing(t *testing.T) {
	s, key := sharedSandbox(t)
	r := s.python(t, key, "box", `import socket
def raw(*kind):
    try:
        socket.socket(*kind).close()
    except PermissionError:
        return "refused"
    return "opened"
print(raw(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP), raw(socket.AF_PACKET, socket.SOCK_RAW, 0))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as s:
    s.settimeout(30)
    s.sendto(b"\x08\0\0\0\0\0\0\x01hello", ("127.0.0.1", 0))
    answer = s.recv(100)
    print(answer[0], answer[8:])`)
	if got, want := r.text("stdout"), "refused refused\n0 b'hello'\n"; got != want {
		t.Errorf("got %+v, want:\n%s", r, want)
	}
}

// TestSandboxHasNoVsock tests that a program in a sandbox cannot open a vsock socket, through no system call ABI and
// not through io_uring. A guest without a network card could use vsock to reach listeners on the host, and Kata's own
// driver gives a vsock device to each guest.
func TestSandboxHasNoVsock(t *testing.T) {
	s, key := sharedSandbox(t)
	r := s.python(t, key, "box", `import ctypes, mmap, socket, struct
VSOCK, EAFNOSUPPORT, ENOSYS, SOCKET, IO_URING_SETUP, X32 = 40, -97, -38, 41, 425, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*map(ctypes.c_long, arguments))
    return -ctypes.get_errno() if result < 0 else result
def call32(number, first, second=1, third=0):
    code = b"\x53\xb8" + struct.pack("<I", number) + b"\xbb" + struct.pack("<I", first)
    code += b"\xb9" + struct.pack("<I", second) + b"\xba" + struct.pack("<I", third) + b"\xcd\x80\x5b\xc3"
    page = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
assert call32(20, 0) == __import__("os").getpid()
assert call(SOCKET, VSOCK, 1, 0) == EAFNOSUPPORT
assert call(X32 + SOCKET, VSOCK, 1, 0) == EAFNOSUPPORT
assert call(SOCKET, VSOCK + (1 << 32), 1, 0) == EAFNOSUPPORT
assert call32(359, VSOCK) == EAFNOSUPPORT
assert call32(102, 1) == ENOSYS
assert call(IO_URING_SETUP, 8, 0) == ENOSYS
assert call32(IO_URING_SETUP, 8) == ENOSYS
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
    socket.socket(family).close()
print(open("/proc/self/status").read().split("Seccomp:")[1].split()[0])`)
	if got := r.text("stdout"); got != "2\n" || r.Status != "success" {
		t.Errorf("the checks in the sandbox failed: %+v, want success and seccomp mode 2", r)
	}
}

// The kernel of a guest leaves the order and the timing of requests for its disks to the host.
func TestSandboxHasPlainDiskQueues(t *testing.T) {
	s, key := sharedSandbox(t)
	if hypervisorSettings["hypervisor"] == "kata" {
		t.Log("Kata's own driver has no such disks")
		return
	}
	r := s.command(t, key, "box", "sh", "-c", "cd /sys/block; for disk in vd*; do echo $(cat $disk/queue/scheduler $disk/queue/wbt_lat_usec); done")
	queues := strings.Split(strings.TrimSpace(r.text("stdout")), "\n")
	for _, queue := range queues {
		if !strings.HasPrefix(queue, "[none]") || !strings.HasSuffix(queue, " 0") {
			t.Errorf("the queue of a disk is %q, want [none] and 0", queue)
		}
	}
	if len(queues) != 2 {
		t.Errorf("%d disks: %q, want that of the image and the writable one", len(queues), queues)
	}
}

func TestConcurrentSandboxes(t *testing.T) {
	s, key := sharedServer(t)
	var g sync.WaitGroup
	for _, name := range []string{"p1", "p2", "p3"} {
		t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
		g.Go(func() {
			if a, err := s.call(key, "sandbox.start", params{"sandbox": name}); err != nil || a.Error != nil {
				t.Errorf("start %s: %v, error %v", name, a, err)
				return
			}
			a, err := s.call(key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "code": "'" + name + "' * 2"})
			if err != nil || !strings.Contains(string(a.Result), name+name) {
				t.Errorf("run in %s: %v, error %v", name, a, err)
			}
		})
	}
	g.Wait()
}

// sameJSON reports whether a and b are equal JSON values.
func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	if err := json.Unmarshal(a, &x); err != nil {
		t.Fatalf("%v: %s", err, a)
	}
	if err := json.Unmarshal(b, &y); err != nil {
		t.Fatal(err)
	}
	p, _ := json.Marshal(x)
	q, _ := json.Marshal(y)
	return string(p) == string(q)
}
