package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestSandboxDoesItsWorst runs attacks in one sandbox, each as a background process. While one runs, a small command can be
// started, the server answers, and another sandbox works. Afterwards, everything that the attack started can be ended.
func TestSandboxDoesItsWorst(t *testing.T) {
	s, key := sharedSandbox(t)
	const name = "worst"
	t.Cleanup(func() { s.call(key, "sandbox.stop", params{"sandbox": name}) })
	s.mustCall(t, key, "sandbox.start", params{"sandbox": name, "config": params{"memory": 128, "disk": 128}}, nil)
	id := s.sandboxID(name)

	start := func(t *testing.T, tag, user, command string, args ...string) {
		t.Helper()
		p := params{"sandbox": name, "tag": tag, "command": command, "args": args}
		if user != "" {
			p["user"] = user
		}
		s.mustCall(t, key, "sandbox.process.start", p, nil)
	}
	// printed returns what the process has printed, and fails the test if it has ended.
	printed := func(t *testing.T, tag string) string {
		t.Helper()
		var r struct {
			runResult
			Running bool
		}
		s.mustCall(t, key, "sandbox.process.logs", params{"sandbox": name, "tag": tag}, &r)
		if !r.Running {
			t.Fatalf("the attack %s has ended: %+v", tag, r)
		}
		return r.text("stdout")
	}
	// works runs a small command and checks that the server and another sandbox answer.
	works := func(t *testing.T, when, user string) {
		t.Helper()
		limit := patience * 20 * time.Second
		p := params{"sandbox": name, "command": "echo", "args": []string{"works"}, "timeout": limit.Seconds()}
		if user != "" {
			p["user"] = user
		}
		begin := time.Now()
		var r runResult
		s.mustCall(t, key, "sandbox.command.run", p, &r)
		t.Logf("%s, echo took %v", when, time.Since(begin).Round(time.Millisecond))
		if r.text("stdout") != "works\n" {
			t.Errorf("%s, echo: %+v", when, r)
		}
		var m struct{ Sandboxes []metrics }
		s.mustCall(t, key, "sandbox.metrics.get", params{"sandbox": name}, &m)
		if len(m.Sandboxes) != 1 || !m.Sandboxes[0].Running || m.Sandboxes[0].Memory == nil {
			t.Errorf("%s, the metrics are %+v", when, m)
		}
		s.mustCall(t, key, "sandbox.get", params{"sandbox": name}, nil)
		if got := s.command(t, key, "box", "echo", "unaffected"); got.text("stdout") != "unaffected\n" {
			t.Errorf("%s, echo in another sandbox: %+v", when, got)
		}
	}
	end := func(t *testing.T, tags ...string) {
		t.Helper()
		for _, tag := range tags {
			s.mustCall(t, key, "sandbox.process.signal", params{"sandbox": name, "tag": tag, "signal": "KILL", "all": true}, nil)
			s.mustCall(t, key, "sandbox.process.wait", params{"sandbox": name, "tag": tag}, nil)
		}
		works(t, "after it", "")
		if got := s.sandboxID(name); got != id {
			t.Fatalf("the sandbox has the id %s, want %s", got, id)
		}
	}

	t.Run("its own limits", func(t *testing.T) {
		// A program cannot open the portal's cgroups, nor change its limit through a mount of its own cgroup.
		r := s.command(t, key, name, "python3", "-c", `import ctypes, glob, os
for path in "/proc/1/fd/4/1/pids.max", "/proc/1/environ", "/proc/1/mem":
    try:
        print("opened", open(path, "r+"))
    except PermissionError:
        pass
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000 | 0x20000 | 0x02000000)) # a user, a mount and a cgroup namespace
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write("0 0 1")
os.mkdir("/tmp/cgroup")
print(libc.mount(b"none", b"/tmp/cgroup", b"cgroup2", 0, None))
print(glob.glob("/tmp/cgroup/pids.*"), os.path.exists("/tmp/cgroup/cgroup.procs"))
try:
    for i in range(100):
        os.mkdir(f"/tmp/cgroup/{i}")
    print("made 100 cgroups")
except OSError:
    pass
`)
		if got := r.text("stdout"); got != "0\n0\n[] True\n" {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("processes", func(t *testing.T) {
		// Each program takes all the threads that it may have, and goes on trying. All belong to one user.
		const filler = `import _thread, threading, time
threading.stack_size(32768)
n = 0
while True:
    try:
        _thread.start_new_thread(time.sleep, (10000,))
        n += 1
    except RuntimeError:
        if n:
            print("full", n, flush=True)
        n = 0
        time.sleep(0.01)
`
		var counts []int
		var tags []string
		for i := range 3 {
			tags = append(tags, fmt.Sprint("filler", i))
			start(t, tags[i], "nobody", "python3", "-c", filler)
			count := 0
			until(t, "the processes to run out", func() bool {
				n, _ := fmt.Sscanf(printed(t, tags[i]), "full %d", &count)
				return n == 1
			})
			counts = append(counts, count)
			works(t, fmt.Sprintf("with %d threads", counts), "nobody")
		}
		if counts[0] < 300 || counts[1] > counts[0]*6/10 || counts[2] > counts[1]*6/10 || counts[2] < 50 {
			t.Errorf("the programs have %d threads, want half of what is left for each", counts)
		}
		if got := s.python(t, key, name, "import subprocess\nprint(subprocess.check_output(['echo', 'works']))"); got.text("stdout") != "b'works\\n'\n" {
			t.Errorf("a context: %+v", got)
		}
		end(t, tags...)
	})
	t.Run("fork bomb", func(t *testing.T) {
		start(t, "bomb", "", "sh", "-c", "f() { f | f & }; f; sleep 10000")
		until(t, "the fork bomb", func() bool {
			return strings.Count(s.command(t, key, name, "sh", "-c", "echo /proc/[0-9]* | tr ' ' '\\n'").text("stdout"), "\n") > 300
		})
		works(t, "during a fork bomb", "")
		end(t, "bomb")
	})
	t.Run("fork bomb in a context", func(t *testing.T) {
		var r runResult
		a, err := s.call(key, "sandbox.repl.run", params{"sandbox": name, "language": "python", "timeout": 5, "code": `import subprocess
subprocess.run(["setsid", "sh", "-c", "f() { f | f & }; f; sleep 10000"])`})
		if err != nil || a.Error == nil || a.Error.Code != -32007 {
			t.Errorf("got %v, %v; want the error that the time limit was reached", a, err)
		}
		works(t, "during a fork bomb in a context", "")
		if r = s.python(t, key, name, "1 + 1"); r.text("stdout") != "2\n" {
			t.Errorf("the next run: %+v", r)
		}
		end(t, "repl:python")
	})
	t.Run("memory", func(t *testing.T) {
		start(t, "hog", "", "python3", "-c", `import os, time
while True:
    try:
        if os.fork() == 0:
            data = [bytearray(8 << 20) for i in range(100)]
            time.sleep(10000)
        print("forked", flush=True)
        os.wait()
    except OSError:
        pass
`)
		until(t, "the memory to run out", func() bool { return strings.Count(printed(t, "hog"), "forked") > 2 })
		works(t, "during a program that uses up the memory", "")
		end(t, "hog")
	})
	t.Run("disk", func(t *testing.T) {
		start(t, "filler", "", "sh", "-c", `true >/root/fill; i=0; while i=$((i+1)) && [ $i -le 1000 ]; do true >/root/file$i || break; done; echo many $i
while :; do cat /dev/zero >>/root/fill; echo full; sleep 0.1; done`)
		until(t, "many files", func() bool { return strings.Contains(printed(t, "filler"), "many") })
		works(t, "with many files: "+strings.Fields(printed(t, "filler"))[1], "")
		until(t, "the disk to be full", func() bool { return strings.Contains(printed(t, "filler"), "full") })
		works(t, "with a full disk", "")
		s.mustCall(t, key, "sandbox.context.restart", params{"sandbox": name, "context": "python"}, nil)
		for language, code := range map[string]string{"python": "print(1 + 1)", "bash": "cat <<X\n2\nX"} {
			var r runResult
			s.mustCall(t, key, "sandbox.repl.run", params{"sandbox": name, "language": language, "code": code}, &r)
			if r.text("stdout") != "2\n" {
				t.Errorf("%s with a full disk: %+v", language, r)
			}
		}
		end(t, "filler")
		s.command(t, key, name, "sh", "-c", "rm /root/f*")
	})
	t.Run("output", func(t *testing.T) {
		start(t, "flood", "", "sh", "-c", "mknod /tmp/console c 5 1; while :; do echo flood >/tmp/console; echo '<0>flood' >/dev/kmsg; done 2>&1")
		start(t, "yes", "", "yes")
		until(t, "output", func() bool {
			for _, tag := range []string{"flood", "yes"} {
				var r struct {
					OutputBytes int `json:"output_bytes"`
				}
				if s.mustCall(t, key, "sandbox.process.get", params{"sandbox": name, "tag": tag}, &r); r.OutputBytes == 0 {
					return false
				}
			}
			return true
		})
		works(t, "during a flood of output", "")
		end(t, "flood", "yes")
	})
}
