package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
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

func TestTheMainJob(t *testing.T) {
	s, key := sharedServer(t)
	script := strings.NewReplacer("127.0.0.1:5555", s.address, "your-api-key-here", key, "curl -X", "curl -s -X").Replace(guideCurl)
	out, err := exec.Command("bash", "-c", script).CombinedOutput()
	if want := `{"jsonrpc":"2.0","id":"1","result":"Sandbox my-env started successfully"}`; err != nil {
		t.Fatalf("curl: %v\n%s", err, out)
	} else if !sameJSON(t, out, []byte(want)) {
		t.Fatalf("curl: %s, want %s", out, want)
	}

	r := s.python(t, key, "my-env", "import platform\nplatform.release()")
	host, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	guest := strings.Trim(r.text("stdout"), "'\n")
	if guest == "" || guest == strings.TrimSpace(string(host)) {
		t.Errorf("the guest's kernel is %q and the host's %q: no microVM", guest, host)
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
	s, key := sharedSandbox(t, "node", "microsandbox/node")
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

func TestRunsThatEndEarly(t *testing.T) {
	s, key := sharedSandbox(t, "early", "microsandbox/python")
	s.python(t, key, "early", "x = 5")
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "early", "language": "python", "code": "while True: pass", "timeout": 1}, 504, -32007, "")
	if got := s.python(t, key, "early", "x").text("stdout"); got != "5\n" {
		t.Errorf("after a run that was interrupted: %q", got)
	}
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "early", "command": "sleep", "args": []string{"60"}, "timeout": 1}, 504, -32007, "")
	s.wantError(t, key, "sandbox.command.run", params{"sandbox": "early", "command": "no-such-program"}, 422, -32008, "no-such-program")
	began := time.Now()
	if r := s.command(t, key, "early", "sh", "-c", "sleep 100 & echo started"); r.text("stdout") != "started\n" || time.Since(began) > 30*time.Second {
		t.Errorf("a background child: %+v after %s", r, time.Since(began))
	}
	if r := s.command(t, key, "early", "sh", "-c", "kill -9 $$"); r.ExitCode != 137 {
		t.Errorf("a killed command: %+v", r)
	}
}

func TestConfigurationReachesTheSandbox(t *testing.T) {
	s, key := sharedServer(t)
	cfg := params{"image": "microsandbox/python", "memory": 256, "cpus": 2, "envs": []string{"GREETING=hello"}, "workdir": "/srv", "volumes": nil, "ports": nil}
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "sized", "config": cfg}, nil)
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": "sized"}) })
	got := s.python(t, key, "sized", "import os\nprint(os.cpu_count(), os.environ['GREETING'], os.getcwd())").text("stdout")
	if got != "2 hello /srv\n" {
		t.Errorf("python sees %q", got)
	}
	if r := s.command(t, key, "sized", "sh", "-c", "echo $GREETING $PWD"); r.text("stdout") != "hello /srv\n" {
		t.Errorf("a command sees %+v", r)
	}
	// 256 MiB hold one of 200, and not one of 300.
	if r := s.python(t, key, "sized", "b = bytearray(200 << 20); len(b)"); r.text("stdout") != "209715200\n" {
		t.Errorf("200 MiB in 256: %+v", r)
	}
	if r := s.python(t, key, "sized", "b = None; b = bytearray(300 << 20); len(b)"); r.Status != "error" {
		t.Errorf("300 MiB in 256: %+v", r)
	}
	if got := s.python(t, key, "sized", "1 + 1").text("stdout"); got != "2\n" {
		t.Errorf("after memory ran out: %q", got)
	}
	s.wantError(t, key, "sandbox.repl.run", params{"sandbox": "sized", "language": "nodejs", "code": "1"}, 409, -32005, "node")
	s.mustCall(t, key, "sandbox.start", params{"sandbox": "sized", "config": cfg}, nil) // equal: nothing happens
	cfg["memory"] = 512
	s.wantError(t, key, "sandbox.start", params{"sandbox": "sized", "config": cfg}, 409, -32005, "memory is 256 MiB, not 512")
}

func TestSandboxesAreApart(t *testing.T) {
	s, key := sharedSandbox(t, "one", "microsandbox/python")
	sharedSandbox(t, "two", "microsandbox/python")
	s.command(t, key, "one", "sh", "-c", "echo secret > /root/file")
	if r := s.command(t, key, "two", "cat", "/root/file"); r.ExitCode == 0 {
		t.Error("one sandbox reads another's file")
	}
	ids := map[string]bool{}
	for _, name := range []string{"one", "two"} {
		ids[s.command(t, key, name, "cat", "/proc/sys/kernel/random/boot_id").text("stdout")] = true
	}
	if len(ids) != 2 {
		t.Error("two sandboxes share a kernel")
	}
}

func TestASandboxHasNoNetwork(t *testing.T) {
	s, key := sharedSandbox(t, "alone", "microsandbox/python")
	if got := s.command(t, key, "alone", "ls", "/sys/class/net").text("stdout"); got != "lo\n" {
		t.Errorf("network interfaces: %q", got)
	}
	host, port, _ := strings.Cut(s.address, ":")
	for _, target := range []string{host, "169.254.169.254", "10.0.2.2"} {
		code := "import socket\nsocket.create_connection(('" + target + "', " + port + "), 3)"
		if r := s.python(t, key, "alone", code); r.Status != "error" {
			t.Errorf("%s is reached: %+v", target, r)
		}
	}
}

func TestSeveralAtOnce(t *testing.T) {
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
