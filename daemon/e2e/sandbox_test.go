package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

// guideCurl is the guide's request, letter for letter but for the address and the key.
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

func TestSandboxLifecycle(t *testing.T) {
	s, key := sharedServer(t)
	script := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key, "curl -X", "curl -s -X").Replace(guideCurl)
	out, err := exec.Command("bash", "-c", script).CombinedOutput()
	if want := `{"jsonrpc":"2.0","id":"1","result":"Sandbox my-env started successfully"}`; err != nil {
		t.Fatalf("curl: %v\n%s", err, out)
	} else if !sameJSON(t, out, []byte(want)) {
		t.Fatalf("curl: %s, want %s", out, want)
	}

	// A kernel that runs has an id of its own, also where host and guest have the same one installed.
	const bootID = "/proc/sys/kernel/random/boot_id"
	r := s.python(t, key, "my-env", "print(open('"+bootID+"').read().strip())")
	host, err := os.ReadFile(bootID)
	if guest := r.text("stdout"); err != nil || len(guest) != len(host) || guest == string(host) {
		t.Errorf("the guest's kernel is %q and the host's %q: no microVM; %v", guest, host, err)
	}
	s.python(t, key, "my-env", "x = 20")
	if got := s.python(t, key, "my-env", "x + 22").text("stdout"); got != "42\n" {
		t.Errorf("state is not kept: %q", got)
	}
	r = s.python(t, key, "my-env", "print('before')\n1/0")
	if r.Status != "error" || r.text("stdout") != "before\n" || !strings.Contains(r.text("stderr"), "ZeroDivisionError") {
		t.Errorf("an exception: %+v", r)
	}
	c := s.command(t, key, "my-env", "sh", "-c", "echo out; echo err >&2; exit 3")
	if c.ExitCode != 3 || c.Success || c.text("stdout") != "out\n" || c.text("stderr") != "err\n" {
		t.Errorf("a command: %+v", c)
	}

	// The work makes the numbers real.
	s.python(t, key, "my-env", "b = bytearray(64 << 20)\nopen('/root/data', 'wb').write(b)\nsum(range(2000000))")
	var m struct{ Sandboxes []metrics }
	s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": "my-env"}, &m)
	if len(m.Sandboxes) != 1 {
		t.Fatalf("metrics: %+v", m)
	}
	if got := m.Sandboxes[0]; !got.Running || got.Namespace != "default" || got.CPU <= 0 || got.Memory == nil || *got.Memory < 64 || got.Disk == nil || *got.Disk < 64<<20 {
		t.Errorf("metrics: %+v", got)
	}

	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "my-env"}, nil)
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "my-env", "language": "python", "code": "1"}, 404, -32003, "my-env")
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "my-env"}, nil)
	if r := s.python(t, key, "my-env", "x"); r.Status != "error" {
		t.Errorf("a new sandbox knows the old one's state: %+v", r)
	}
	s.mustCall(t, key, "sandbox.stop", params{"sandbox": "my-env"}, nil)
}

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
		t.Errorf("state is not kept: %q", got)
	}
	if r := run("throw new TypeError('boom')"); r.Status != "error" || !strings.Contains(r.text("stderr"), "TypeError: boom") {
		t.Errorf("an error: %+v", r)
	}
	if r := s.command(t, key, "node", "npm", "--version"); r.ExitCode != 0 {
		t.Errorf("npm: %+v", r)
	}
}

func TestTimeoutsAndExitCodes(t *testing.T) {
	s, key := sharedSandbox(t)
	s.python(t, key, "box", "x = 5")
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "box", "language": "python", "code": "while True: pass", "timeout": 1}, 504, -32007, "")
	if got := s.python(t, key, "box", "x").text("stdout"); got != "5\n" {
		t.Errorf("after a run that was interrupted: %q", got)
	}
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "sleep", "args": []string{"60"}, "timeout": 1}, 504, -32007, "")
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "box", "command": "no-such-program"}, 422, -32008, "no-such-program")
	// Nobody waits for a background child.
	if r := s.command(t, key, "box", "sh", "-c", "sleep 9999 & echo started"); r.text("stdout") != "started\n" {
		t.Errorf("a background child: %+v", r)
	}
	if r := s.command(t, key, "box", "sh", "-c", "kill -9 $$"); r.ExitCode != 137 {
		t.Errorf("a killed command: %+v", r)
	}
}

func TestSandboxConfiguration(t *testing.T) {
	s, key := sharedServer(t)
	cfg := params{"image": "microsandbox/python", "memory": 256, "cpus": 2, "envs": []string{"GREETING=hello"}, "workdir": "/srv", "volumes": nil, "ports": nil}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "settled", "config": cfg}, nil)
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "settled"}) })
	got := s.python(t, key, "settled", "import os\nprint(os.environ['GREETING'], os.getcwd())").text("stdout")
	if got != "hello /srv\n" {
		t.Errorf("python sees %q", got)
	}
	if r := s.command(t, key, "settled", "sh", "-c", "echo $GREETING $PWD"); r.text("stdout") != "hello /srv\n" {
		t.Errorf("a command sees %+v", r)
	}
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "settled", "language": "nodejs", "code": "1"}, 409, -32005, "node")
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "settled", "config": cfg}, nil) // equal: nothing happens
	cfg["memory"] = 512
	s.wantError(t, key, "sandbox.start", params{"sandbox": "settled", "config": cfg}, 409, -32005, "memory is 256 MiB, not 512")
}

func TestSandboxesAreIsolated(t *testing.T) {
	s, key := sharedSandbox(t)
	startSandbox(t, "another", "microsandbox/python")
	s.command(t, key, "box", "sh", "-c", "echo secret > /root/file")
	if r := s.command(t, key, "another", "cat", "/root/file"); r.ExitCode == 0 {
		t.Error("one sandbox reads another's file")
	}
	ids := map[string]bool{}
	for _, name := range []string{"box", "another"} {
		ids[s.command(t, key, name, "cat", "/proc/sys/kernel/random/boot_id").text("stdout")] = true
	}
	if len(ids) != 2 {
		t.Error("two sandboxes share a kernel")
	}
}

func TestSandboxHasNoNetwork(t *testing.T) {
	s, key := sharedSandbox(t)
	if got := s.command(t, key, "box", "ls", "/sys/class/net").text("stdout"); got != "lo\n" {
		t.Errorf("network interfaces: %q", got)
	}
	host, port, _ := strings.Cut(s.address, ":")
	for _, target := range []string{host, "169.254.169.254", "10.0.2.2"} {
		code := "import socket\nsocket.create_connection(('" + target + "', " + port + "), 3)"
		if r := s.python(t, key, "box", code); r.Status != "error" {
			t.Errorf("%s is reached: %+v", target, r)
		}
	}
}

// A machine without a network card may have another way out: vsock, which leads to the host's listeners. Kata's own
// driver gives one to each guest.
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
		t.Errorf("what a program in a sandbox can open: %+v", r)
	}
}

func TestConcurrentSandboxes(t *testing.T) {
	s, key := sharedServer(t)
	var g sync.WaitGroup
	for _, name := range []string{"p1", "p2", "p3"} {
		t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
		g.Go(func() {
			if a, err := s.call(key, "sandbox.start", params{"sandbox": name}); err != nil || a.Error != nil {
				t.Errorf("start %s: %v %v", name, a, err)
				return
			}
			a, err := s.call(key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "code": "'" + name + "' * 2"})
			if err != nil || !strings.Contains(string(a.Result), name+name) {
				t.Errorf("run in %s: %v %v", name, a, err)
			}
		})
	}
	g.Wait()
}

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
